"""The predicted cost of a step: what was measured on an H100 lies in it, and `check --cost` prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_cases import row_lengths
from random_models import model_facts, model_sizes

from trainer.commands.cli import main
from trainer.config.load import known_devices
from trainer.planning.roofline import StepCost, step_cost

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"


def cost(model: str, lengths: list[int], *, is_compiled: bool, is_lora: bool = True) -> StepCost:
    scored = sum(length - max(1, length // 4) for length in lengths)
    device = known_devices()["h100"]
    return step_cost(model_facts(model), device, lengths, scored, is_lora=is_lora, is_compiled=is_compiled)


@pytest.mark.parametrize(("model", "measured_ms"), [("Qwen3-8B", 436.3), ("Qwen2.5-1.5B", 161.8)])
def test_uncompiled_steps_of_an_h100_are_within_the_prediction(model, measured_ms):
    """docs/performance.md, "On a GPU", with head tiles of 1,024 rows; 3% are allowed at the ends."""
    fast, slow = cost(model, row_lengths(4096, 8, 0), is_compiled=False).step_s
    assert 0.97 * fast < measured_ms / 1e3 < 1.03 * slow


def test_full_parameters_before_the_change_of_tiles_were_outside():
    """The head wrote [V, H] for every 64 rows, which the prediction does not contain."""
    case = next(each for each in json.loads(RESULTS.read_text())["cases"] if each["name"] == "SFT full Qwen2.5-1.5B")
    assert (
        case["seconds_per_step"]
        > cost("Qwen2.5-1.5B", row_lengths(4096, 8, 0), is_compiled=False, is_lora=False).step_s[1]
    )


def test_compiling_and_long_documents_move_it_as_they_should():
    eager, compiled = (cost("Qwen3-8B", [1024] * 4, is_compiled=flag) for flag in (False, True))
    assert compiled.step_s[1] < eager.step_s[0] * 1.2
    assert compiled.mfu[1] > eager.mfu[1]
    long = cost("Qwen3-8B", [4096], is_compiled=True)
    assert long.parts_s["attention"][0] == pytest.approx(4 * compiled.parts_s["attention"][0])
    assert long.flops > compiled.flops


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(model_sizes("Qwen2.5-1.5B")))
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    sections = {
        "name": "cost",
        "method": "sft",
        "steps": 1,
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl"},
    }
    Path("recipe.yaml").write_text(json.dumps(sections))


def test_check_prints_the_cost_of_gpu_shapes_only(recipe, capsys):
    assert main(["check", "recipe.yaml", "--cost", "--shape", "h100x1"]) == 0
    said = capsys.readouterr().out
    for words in ("Predicted, not measured", "documents per pack", "MFU (4N)", "attention", "host, at the same time"):
        assert words in said
    assert main(["check", "recipe.yaml", "--cost", "--shape", "h100x8"]) == 0
    assert "Sharded weights: each GPU receives" in capsys.readouterr().out
    assert main(["check", "recipe.yaml", "--cost", "--shape", "cpu", "--set", "data.max_seq_tokens=512"]) == 2
    assert "no rates are known of" in capsys.readouterr().err
