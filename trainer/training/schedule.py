"""The optimizer's parameters of a step, as a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from trainer.config.recipe import OptimizerSettings
from trainer.planning.schedule import learning_rate


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
