"""4-bit bases: what is said where bitsandbytes is missing, and what the estimate makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_recipe import SFT, write_small

from trainer.checks.memory_dry_run import main
from trainer.config.load import find_shape, load_recipe
from trainer.config.recipe import ModelSettings
from trainer.errors import ModelError
from trainer.model.quantization import quantized_loading
from trainer.planning.memory import estimate_memory
from trainer.planning.model_facts import ModelFacts
from trainer.planning.plan import make_plan

NF4 = "model.quantization=nf4"


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path, SFT)


def test_the_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python itself marks a module that is not there
    with pytest.raises(ModelError, match=r"needs bitsandbytes; install the extra: pip install 'tunesmith\[qlora\]'"):
        quantized_loading(ModelSettings(path="model", quantization="nf4"), torch.device("cpu"))


def test_linear_layers_take_half_a_byte_and_a_scale_for_64():
    facts = ModelFacts(hidden=64, layers=2, query_width=64, key_width=64, intermediate=128, vocab=100, is_tied=True)
    plain, small = (
        estimate_memory(load_recipe(Path("recipe.yaml"), overrides).recipe, find_shape("h100x1"), facts)
        for overrides in ([], [NF4])
    )
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    saved = linear * (2 - 0.5 - 4 / 64)
    assert plain.parts["base weights"] - small.parts["base weights"] == pytest.approx(saved / 2**30)
    assert small.state_gib == plain.state_gib


def test_it_is_another_run_and_only_estimated(capsys):
    identities = {make_plan(load_recipe(Path("recipe.yaml"), given)).identity_hash for given in ([], [NF4])}
    assert len(identities) == 2
    assert main(["recipe.yaml", "--set", NF4]) == 2
    assert "a model in 4 bits is only estimated" in capsys.readouterr().err
