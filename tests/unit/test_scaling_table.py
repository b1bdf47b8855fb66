"""The tables of docs/scaling.md: current, from formulas that agree with a ring, the benchmark and `trainer check`."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flops import training_flops
from random_models import one_device

from trainer.config.recipe import SFTRecipe
from trainer.planning.memory import estimate_memory

SCRIPT = Path(__file__).parents[2] / "scripts" / "scaling_table.py"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_table"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def received_in_ring(gpus: int, *, is_reduced: bool) -> int:
    """Parts that each GPU receives until all have everything; `is_reduced`: until all have the sum of everything."""
    received = 0
    if is_reduced:  # sums of parts go round until each GPU has one whole sum
        summands = [{(gpu, part): 1 for part in range(gpus)} for gpu in range(gpus)]
        for turn in range(gpus - 1):
            sent = [summands[gpu][gpu, (gpu - turn) % gpus] for gpu in range(gpus)]
            for gpu in range(gpus):
                summands[gpu][gpu, (gpu - 1 - turn) % gpus] += sent[gpu - 1]
            received += 1
        assert all(summands[gpu][gpu, (gpu + 1) % gpus] == gpus for gpu in range(gpus))
    held = [{gpu} for gpu in range(gpus)]
    for turn in range(gpus - 1):
        for gpu in range(gpus):
            held[gpu].add((gpu - 1 - turn) % gpus)
        received += 1
    assert all(len(parts) == gpus for parts in held)
    return received


def test_the_page_has_the_numbers_of_the_formulas(scaling: ModuleType) -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.filled(page) == page, "run scripts/scaling_table.py"
    with pytest.raises(ValueError, match="table 'hiding' are there 0 times"):
        scaling.filled("no marks")


def test_examples_in_docstrings(scaling: ModuleType) -> None:
    done = doctest.testmod(scaling)
    assert done.attempted >= 3
    assert done.failed == 0


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_bytes_are_those_of_a_ring(scaling: ModuleType, gpus: int) -> None:
    facts = scaling.model("8B")
    part = 2 * facts.params / gpus
    assert scaling.gather_bytes(facts, gpus) == pytest.approx(2 * part * received_in_ring(gpus, is_reduced=False))
    part = 2 * (facts.params - 2 * 128_256 * 4096 - 4096) / gpus  # without embedding, head and last norm
    assert scaling.block_bytes(facts, gpus) == pytest.approx(2 * part * received_in_ring(gpus, is_reduced=False))
    part = 4 * facts.lora_params(scaling.LORA) / gpus
    assert scaling.adapter_bytes(facts, gpus) == pytest.approx(part * received_in_ring(gpus, is_reduced=True))


def test_keys_and_values_of_llama_8b_are_128_kib_a_token(scaling: ModuleType) -> None:
    """32 layers x (keys, values) x 8 heads of 128 x 2 bytes; three quarters of them come from the other three GPUs."""
    facts = scaling.model("8B")
    assert scaling.context_bytes(facts, 1000, 4) == pytest.approx(3 * 0.75 * 1000 * 131_072)


@pytest.mark.parametrize("is_lora", [True, False])
def test_flops_are_those_of_the_benchmark_and_the_blocks_once_more(scaling: ModuleType, is_lora: bool) -> None:
    facts, context = scaling.model("8B"), 8192
    trained = training_flops(facts, [context], context, is_lora=is_lora)
    blocks = 2.0 * facts.active_block_params * context + 2.0 * facts.layers * facts.query_width * context**2
    ours = context * scaling.flops_per_token(facts, context, is_lora=is_lora)
    assert ours == pytest.approx(trained + blocks, rel=1e-9)


@pytest.mark.parametrize("is_lora", [True, False])
def test_one_gpu_needs_about_what_check_predicts(scaling: ModuleType, is_lora: bool) -> None:
    facts, context = scaling.model("8B"), 8192
    recipe = SFTRecipe.model_validate(
        {
            "name": "one", "method": "sft", "steps": 1, "lora": {"rank": 16} if is_lora else None,
            "model": {"path": "8B", "gradient_checkpointing": True},
            "data": {"train": {"path": "rows.jsonl"}, "max_seq_tokens": context},
        }
    )  # fmt: skip
    shape = one_device(torch.device("cpu"), context)
    predicted = estimate_memory(recipe, shape, facts)
    ours = scaling.memory_gib(facts, 1, context, 1, is_lora=is_lora)
    assert ours - scaling.PROCESS_GIB["cuda"] == pytest.approx(
        predicted.total_gib - predicted.parts["process"], rel=0.05
    )


def test_a_sequence_is_cut_only_as_far_as_memory_asks(scaling: ModuleType) -> None:
    facts = scaling.model("8B")
    made = scaling.step(facts, 64, 1_048_576, is_lora=True)
    assert made.fits
    assert scaling.memory_gib(facts, 64, 1_048_576, made.parts // 2, is_lora=True) > scaling.GPU_GIB
    assert made.sequences * made.parts == 64


def test_from_the_stated_tokens_on_bytes_hide(scaling: ModuleType) -> None:
    facts = scaling.model("70B")
    received = scaling.full_bytes(facts, 64)
    tokens = scaling.hiding_tokens(received, facts, is_lora=False, rate=scaling.bandwidth(64))
    compute_s = tokens * scaling.flops_per_token(facts, 8192, is_lora=False) / scaling.FLOPS
    assert compute_s == pytest.approx(received / 400e9)
    context = scaling.hiding_context(facts, 8, scaling.NVLINK)
    attention = 4 * 2.0 * facts.layers * facts.query_width * context * (context / 8) / scaling.FLOPS
    assert attention == pytest.approx(scaling.context_bytes(facts, context, 8) / scaling.NVLINK)
