"""The optimizer's parameters of a step, as a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from trainer.config.recipe import OptimizerSettings


@final
@dataclass(frozen=True)
class AdamParams:
    """Parameters of one AdamW update."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    """Of matrices; vectors (norms, biases) are not decayed."""
    max_grad_norm: float | None
    """The gradient is scaled down to this norm; None is no limit."""

    @classmethod
    def of(cls, settings: OptimizerSettings, learning_rate: float) -> AdamParams:
        """The recipe's parameters at a learning rate."""
        return cls(
            learning_rate=learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )


def adam_params(settings: OptimizerSettings, step: int, steps: int) -> AdamParams:
    """Parameters of the updates that make step `step` + 1; see `learning_rate`.

    Args:
        settings: of the recipe.
        step: steps made so far, from 0.
        steps: length of the run.
    """
    return AdamParams.of(settings, learning_rate(settings, step, steps))


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of the updates that make step `step` + 1.

    Args:
        settings: peak, schedule, warm-up, end.
        step: steps made so far, from 0.
        steps: length of the run.

    >>> from trainer.config.recipe import OptimizerSettings
    >>> settings = OptimizerSettings(learning_rate=1.0, schedule="linear", warmup_steps=2)
    >>> [round(learning_rate(settings, step, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    floor = settings.min_learning_rate_frac
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * (floor + (1.0 - floor) * decay[settings.schedule])
