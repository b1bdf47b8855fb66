"""Saved states of the training API as other commands take them: exported, found by path, refused when damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from raw_states import trained_state
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM

from trainer.checkpoints.saved_state import find_state
from trainer.errors import CheckpointError, LaunchError
from trainer.export.cli import main as export
from trainer.inference.source import find_source


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, and a state in the place where a server keeps it."""
    root: Path = tmp_path_factory.mktemp("project")
    tiny_model_dir(root / "model", "llama", scale=5.0)
    trained_state(root / "model", root / "runs/.training/models/0a1b.train.0/weights/sft")
    return root


PATH = "tinker://0a1b:train:0/weights/sft"


@pytest.mark.parametrize("path", [PATH, f"runs/.training#{PATH}", "runs/.training/models/0a1b.train.0/weights/sft"])
def test_a_state_is_found_by_directory_and_by_path(place: Path, monkeypatch, path: str) -> None:
    monkeypatch.chdir(place)
    found = find_state(path)
    assert found == Path("runs/.training/models/0a1b.train.0/weights/sft")
    source = find_source(path)
    assert (source.label, source.model.path, source.adapter) == ("sft", str(place / "model"), found)
    assert source.lora is not None
    assert source.lora.rank == 4


def test_what_is_not_there_is_said_with_the_place_and_the_remedy(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(CheckpointError, match=r"there is no runs/.training/models/0a1b.train.1/.*write DIR#tinker://"):
        find_source("tinker://0a1b:train:1/weights/sft")
    with pytest.raises(CheckpointError, match=r"not tinker://MODEL/\{weights,sampler_weights\}/NAME"):
        find_source("tinker://0a1b:train:0/sft")
    with pytest.raises(LaunchError, match="no run, no adapter"):
        find_source("./nothing")


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None]).logits.log_softmax(-1)


def test_a_state_is_exported_merged_and_as_an_adapter(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    state = "runs/.training/models/0a1b.train.0/weights/sft"
    assert export([state, "--merge", "--out", str(tmp_path / "merged")]) == 0
    assert export([state, "--out", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().err
    assert said.count("verified on 3 held-out texts: logprobs differ from the trained policy's by") == 2
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    before = logprobs(base)
    adapted = logprobs(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    merged = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert (adapted - before).abs().mean() > 0.1, "it has learned"
    assert (merged - adapted).abs().mean() < 0.05, "but for rounding to bfloat16"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "add --out DIR"),
        (["--best", "--out", "x"], "--best goes with a run; this is a saved state"),
        (["--push", "me/x", "--merge", "--out", "x"], "--push goes with a run"),
        (["--gguf", "q8_0", "--out", "x"], "--gguf of a saved state needs --merge"),
    ],
)
def test_what_goes_with_runs_only_is_refused(place: Path, monkeypatch, capsys, arguments, says) -> None:
    monkeypatch.chdir(place)
    assert export(["runs/.training/models/0a1b.train.0/weights/sft", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not Path("x").exists()


def test_a_damaged_state_or_another_base_is_refused(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "runs/.training/models/0a1b.train.0/weights/sft", "state")
    weights = Path("state/adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"state/adapter_model.safetensors: missing or damaged"):
        find_source("state")
    assert export(["state", "--out", "out"]) == 1
    weights.write_bytes(whole)
    config = place / "model" / "model.safetensors"
    before = config.read_bytes()
    config.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert export(["state", "--out", "out"]) == 1
    config.write_bytes(before)
    assert "has changed since it was trained" in capsys.readouterr().err
    assert not Path("out").exists()
