"""Sequences of the engine that run to their end, and what a model itself would draw; for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from trainer.engine.adapters import AdapterVersion
from trainer.engine.model import EngineModel
from trainer.engine.own_model import OwnModel
from trainer.engine.protocol import Sampling
from trainer.engine.scheduler import Scheduler
from trainer.engine.sequences import LiveSequence

PROMPT: Final = tuple(range(5, 75))
"""More than two pages."""


def sequence(prompt: Sequence[int] = PROMPT, adapter: AdapterVersion | None = None, **how: Any) -> LiveSequence:
    settings = {"max_tokens": 12, "seed": 7, "temperature": 0.0, **how}
    return LiveSequence(f"{prompt[0]}-{settings}", tuple(prompt), Sampling(**settings), adapter)


def run(model: EngineModel | OwnModel, sequences: Sequence[LiveSequence], **settings: Any) -> Scheduler:
    """Run sequences to their end, all pages free again."""
    pages = settings.pop("pages", 64)
    scheduler = Scheduler(model, model.pool(pages), **settings)
    for each in sequences:
        scheduler.add(each)
    while not scheduler.is_idle:
        scheduler.step()
    assert scheduler.pool.num_used == 0
    return scheduler


def greedy(causal_lm: Any, prompt: Sequence[int], count: int) -> list[int]:
    """By the model's own forward pass, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(causal_lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
