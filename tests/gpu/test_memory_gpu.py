"""What `trainer check` predicts is what a training step takes, within a tenth."""

from __future__ import annotations

import gc

import pytest
import torch
from random_models import allocated_gib, predicted_memory, random_policy

from trainer.config.recipe import LoraSettings, OptimizerSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

TOKENS = 4096
ROWS = (1024, 700, 700, 600, 500, 300, 200, 72)
STEPS = 3


def rows() -> list[TokenSequence]:
    assert sum(ROWS) == TOKENS
    return [
        TokenSequence(
            tuple(3 + position % 1000 for position in range(length)),
            (False,) + (True,) * (length - 1),
            TokenInputs(weights=(1.0,) * (length - 1)),
        )
        for length in ROWS
    ]


@pytest.mark.parametrize(
    ("model", "kind", "checkpointing"),
    [
        ("Qwen2.5-1.5B", "lora", False),
        ("Qwen2.5-1.5B", "lora", True),
        ("Qwen2.5-1.5B", "full", False),
        ("Qwen3-8B", "lora", False),
        ("Qwen3-8B", "lora", True),
    ],
)
def test_predicted_memory_is_the_measured(cuda, model, kind, checkpointing, record_property):
    lora = LoraSettings() if kind == "lora" else None
    estimate = predicted_memory(model, cuda, lora, TOKENS, checkpointing=checkpointing)
    if not estimate.fits:
        pytest.skip(f"needs {estimate.total_gib:.0f} GiB and the device has {estimate.available_gib:.0f}")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    learner = Learner(random_policy(model, cuda, lora, checkpointing=checkpointing), World(0, 1, cuda))
    torch.cuda.reset_peak_memory_stats()  # the peak of training; making random weights is another matter
    for _ in range(STEPS):
        pack = Batch.pack(rows(), cuda)
        learner.learn([pack], sft_loss, AdamParams.of(OptimizerSettings(), 1e-6), denominator=float(pack.num_trained))

    measured = (torch.cuda.max_memory_allocated() - before) / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    predicted = allocated_gib(estimate)
    record_property("measured_gib", measured)
    record_property("predicted_gib", predicted)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in estimate.parts.items())
    assert predicted == pytest.approx(measured, rel=0.1), f"predicted {predicted:.2f}, measured {measured:.2f}: {parts}"
    assert reserved <= estimate.total_gib, "what the allocator takes from the device is within the whole prediction"
