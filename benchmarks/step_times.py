"""Seconds of each optimizer step of a transformers trainer."""

from __future__ import annotations

from typing import Any

import torch
from machine import now
from transformers import TrainerCallback

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, including generation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = now(DEVICE)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now(DEVICE) - self.begin)
