"""The learning rate of a step: a function of the recipe, the step and the length of the run. No torch."""

from __future__ import annotations

import math

from trainer.config.recipe import OptimizerSettings


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
