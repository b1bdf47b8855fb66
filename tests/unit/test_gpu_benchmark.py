"""The GPU benchmark runs from end to end on a tiny model, and counts the FLOPs that torch counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flops import forward_flops, sampling_flops, training_flops
from gpu_cases import TINY, row_lengths, sft_rows
from random_models import KINDS, model_facts, random_causal_lm
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.recipe import ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.model.batch import Batch
from trainer.model.policy import make_policy

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_case_runs_and_is_reported(tmp_path: Path) -> None:
    argv = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [case["name"] for case in result["cases"]] == [
        "SFT LoRA tiny",
        "SFT full tiny",
        "RFT learn tiny",
        "sampling tiny",
    ]
    for case in result["cases"]:
        assert "did_not_run" not in case, case
        assert case["tokens_per_s"] > 0
        assert 0 < case["mfu"] < 1
        assert case.get("trl_did_not_run") == {}
    assert set(result["cases"][0]["trl_tokens_per_s"]) == {"TRL padded", "TRL packed"}
    text = (tmp_path / "gpu.md").read_text()
    assert "these numbers mean nothing" in text
    assert text.count("\n| ") == 1 + len(result["cases"])


def test_flops_are_those_that_torch_counts() -> None:
    """With full parameters, since adapters are left out of the formula. Our CPU attention computes all L x L pairs."""
    facts = model_facts("tiny")
    policy = make_policy(random_causal_lm("tiny", CPU, dtype=torch.float32), ModelSettings(path="tiny"), None, 0)
    length = 40
    trained = (False,) * 10 + (True,) * 30
    pack = Batch.pack([TokenSequence(tuple(range(3, 3 + length)), trained)], CPU)
    whole_attention = forward_flops(facts, [length], 0) - forward_flops(facts, [1] * length, 0)
    whole_attention *= length * length / (length * length - length)  # the difference lacks the diagonal
    with FlopCounterMode(display=False) as counted:
        scores = policy(pack)
    head_again = 2.0 * facts.vocab * facts.hidden * pack.num_trained
    assert counted.get_total_flops() == pytest.approx(forward_flops(facts, [length], 30) + whole_attention)
    with FlopCounterMode(display=False) as backward:
        scores.logprobs.sum().backward()
    expected = training_flops(facts, [length], 30, is_lora=False) + 3 * whole_attention + head_again
    total = counted.get_total_flops() + backward.get_total_flops()
    assert total == pytest.approx(expected), "the head's logits are computed twice, counted once"


def test_sampling_counts_each_prompt_once_and_each_drawn_token() -> None:
    """Prompt and completions, as one forward pass over the tree of them would have it."""
    facts = model_facts("tiny")
    alone = forward_flops(facts, [8 + 16], 1 + 16)
    assert sampling_flops(facts, [8], 1, 16) == pytest.approx(alone)
    assert sampling_flops(facts, [8], 2, 16) == pytest.approx(2 * alone - forward_flops(facts, [8], 1))


@pytest.mark.parametrize("name", KINDS)
def test_models_of_the_benchmark_have_the_published_number_of_parameters(name: str) -> None:
    assert model_facts(name).params == pytest.approx({"Qwen2.5-1.5B": 1.54e9, "Qwen3-8B": 8.19e9}[name], rel=0.005)
    with torch.device("meta"):
        model = random_causal_lm(name, torch.device("meta"))
    real = sum(parameter.numel() for parameter in model.parameters())
    assert model_facts(name).params == pytest.approx(real, rel=1e-3), "biases and inner norms are not counted"


def test_rows_of_a_step_fill_its_pack() -> None:
    assert sum(row_lengths(4096, 8, 0)) == 4096
    assert len(set(row_lengths(4096, 8, 0))) > 4
    rows = sft_rows(TINY, 0)
    assert sum(len(row.token_ids) for row in rows) == TINY.pack_tokens
    assert all(len(row.inputs.weights) == row.num_trained for row in rows)
