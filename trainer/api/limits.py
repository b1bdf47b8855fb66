"""Limits of an executor, and of an account in it; for the executor and its process. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from trainer.api.protocol import Refused


@final
@dataclass(frozen=True)
class Limits:
    """Of one executor."""

    slots: int = 8
    """Models in memory."""
    lease_s: float = 120.0
    """Time without a sign of its client after which a model is saved and its slot freed."""
    max_rank: int = 128
    checkpoint_s: float = 30.0
    """Seconds of work after which a checkpoint is written: what a crash costs."""
    journal_bytes: int = 1 << 26
    """The same in bytes of requests."""


def check_count(count: int, most: int | None) -> None:
    """Refuse one more model of an account.

    Args:
        count: of its models that are in training.
        most: that may be; None is any number.

    Raises:
        Refused: there are as many as the account may train at once.
    """
    if most is not None and count >= most:
        text = f"{most} models in training at once is the limit, and {count} are open: finish a session, or wait"
        raise Refused(429, text, code="training_models", retry_s=10)
