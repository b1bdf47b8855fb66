"""Reinforcement fine-tuning: the loop."""

from __future__ import annotations

from trainer.errors import RecipeError
from trainer.session import Session


def train(session: Session) -> None:
    """Not here yet; `sft` is."""
    raise RecipeError([f"{session.run.root}: method rft does not run in this version"])
