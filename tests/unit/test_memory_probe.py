"""A dry-run step on fake tensors: against the estimate, and as `trainer check --memory`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from small_recipe import RFT, SFT, write_small

from trainer.checks.memory_dry_run import LiveStorages, config_of, main, measure
from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
MIXTURE: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan_of(recipe: str, *overrides: str, model_type: str = "llama", **sizes: Any):
    write_small(Path(), recipe)
    (Path("model") / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **sizes}))
    return make_plan(load_recipe(Path("recipe.yaml"), [*overrides, "rows_per_step=64", "data.max_seq_tokens=512"]))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # PEFT's own, of experts that it does adapt
@pytest.mark.parametrize(
    ("recipe", "overrides", "sizes"),
    [
        (SFT, [], {}),
        (SFT, ["model.compute_dtype=float32"], {}),
        (SFT, ["model.gradient_checkpointing=true"], {"num_hidden_layers": 8}),
        (SFT, ["lora=null"], {"tie_word_embeddings": False}),
        (SFT, ["data.max_seq_tokens=256"], {}),
        (SFT, [], {"model_type": "qwen3", "head_dim": 32}),
        (SFT, [], {"model_type": "mixtral", **MIXTURE}),
        (RFT, ["rollout.max_completion_tokens=256"], {}),
        (RFT, ["lora=null", "rollout.max_completion_tokens=256"], {}),
    ],
    ids=["lora", "float32", "checkpointed", "full", "scores", "qwen3", "mixtral", "rft", "rft-full"],
)
def test_the_estimate_is_within_5_percent_of_the_step(recipe, overrides, sizes):
    plan = plan_of(recipe, *overrides, **sizes)
    measured, estimate = measure(plan, config_of(plan)), plan.memory
    assert estimate is not None
    assert measured.weights_gib == pytest.approx(estimate.weights_gib, rel=0.01)
    assert measured.state_gib == pytest.approx(estimate.state_gib, rel=0.01)
    assert measured.step_gib == pytest.approx(estimate.phases["learning"], rel=0.05)


def test_storages_count_while_they_live_and_views_count_once():
    with LiveStorages() as storages:
        first = torch.empty(1000)
        second = first.view(10, 100).T
        third = first + 1
        assert storages.now == 8000
        del first, third
        assert storages.now == 4000
        del second
    assert (storages.now, storages.peak) == (0, 8000)


def test_check_memory_prints_measured_beside_estimated(capsys):
    plan_of(SFT)
    assert main(["recipe.yaml", "--set", "data.max_seq_tokens=512", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    step = about["parts_gib"]["a step, in addition"]
    assert step["measured"] == pytest.approx(step["estimated"], rel=0.1)
    assert about["measured_gib"] == pytest.approx(about["estimated_gib"], rel=0.05)
    assert main(["recipe.yaml", "--set", "data.max_seq_tokens=512"]) == 0
    text = capsys.readouterr().out
    assert "memory per device of cpu, a micro-batch of 1,024 tokens" in text
    assert f"{about['measured_gib']:.2f}" in next(line for line in text.splitlines() if line.startswith("  peak"))


def test_a_sharded_shape_is_only_estimated(capsys):
    plan_of(SFT)
    assert main(["recipe.yaml", "--shape", "h100x8"]) == 2
    assert "h100x8: a sharded model is only estimated, not measured" in capsys.readouterr().err


def test_a_model_that_nobody_knows_is_refused_in_words(capsys):
    plan_of(SFT, model_type="nonesuch")
    assert main(["recipe.yaml"]) == 2
    assert "nonesuch" in capsys.readouterr().err
