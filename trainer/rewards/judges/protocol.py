"""What the reward runner and a judge need of each other; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, final

from trainer.rewards.call_result import CallResult
from trainer.rewards.judges.costs import JudgeCosts
from trainer.types import Row

Item: TypeAlias = tuple[str, Row]
"""The text of a completion, and its row."""


class PendingResults(Protocol):
    """Results of some items, in order."""

    def result(self) -> list[CallResult]:
        """Wait for them."""


class Judge(Protocol):
    """A reward that a server computes."""

    def submit(self, items: Sequence[Item], sizes: Sequence[int]) -> Sequence[PendingResults]:
        """Start to score; the results, concatenated, are those of the items.

        Args:
            items: completions with their rows, group by group.
            sizes: of the groups.
        """

    def close(self) -> None:
        """End every wait."""


@final
@dataclass(frozen=True)
class Surroundings:
    """What judges have of the run that asks them."""

    say: Callable[[str], None] = lambda _: None
    """Prints a message to the user."""
    keep_waiting: Callable[[], None] = lambda: None
    """Called several times a second between attempts; raises where the run is to stop."""
    costs: JudgeCosts = field(default_factory=JudgeCosts)
    may_wait: bool = True
    """False where a person waits: an outage then counts as failure."""
