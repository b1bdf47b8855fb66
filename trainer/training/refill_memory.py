"""What a run remembers of its prompts for `refill`: how often their rollouts earn different rewards. For rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Final, final

from trainer.config.rft_sections import RolloutSettings
from trainer.training.saver import Saver
from trainer.types import Group

FILE: Final = "refill.json"
"""Name in a checkpoint."""
KEPT_FRAC: Final = 0.5
"""Weight of what was known of a prompt beside its newest group."""


@final
class RefillMemory:
    """Estimates for each prompt the chance that two of its rollouts earn different rewards.

    With rewards 0 and 1 and solve rate p that is 2 p (1 - p): most for prompts that are solved half of the time, 0 for
    those solved always or never. Other rewards need no threshold. A prompt that was not drawn yet counts as the mean of
    those that were. Equal on all ranks, and a function of the groups that were drawn, so a resumed run has the same.

    >>> memory = RefillMemory()
    >>> memory.observe([(7, 0.0), (3, 0.5)])
    >>> list(memory.order([1, 3, 5, 7]))
    [3, 1, 5, 7]
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Know nothing; `say` tells the user of a checkpoint without memory."""
        self._say = say
        self._of_row: dict[int, tuple[float, float]] = {}
        """By row: groups, and the sum of their `spread`; older groups count less."""

    def observe(self, spreads: Iterable[tuple[int, float]]) -> None:
        """Take in the groups of a step.

        Args:
            spreads: row and `spread` of each, in an order that is the same on all ranks.
        """
        for row, value in spreads:
            groups, total = self._of_row.get(row, (0.0, 0.0))
            self._of_row[row] = (KEPT_FRAC * groups + 1.0, KEPT_FRAC * total + value)

    def order(self, rows: Iterable[int]) -> Iterator[int]:
        """The rows by falling chance of a signal; those whose chances agree to one decimal stay in the order given.

        Args:
            rows: in a random order.
        """
        if not self._of_row:
            yield from rows
            return
        seen = self._of_row.values()
        mean = math.fsum(total for _, total in seen) / math.fsum(groups for groups, _ in seen)

        def chance(row: int) -> float:
            groups, total = self._of_row.get(row, (0.0, 0.0))
            return round((total + mean) / (groups + 1.0), 1)

        yield from sorted(rows, key=chance, reverse=True)  # stable, also reversed

    def dump(self) -> str:
        """As text for a checkpoint."""
        return json.dumps({str(row): value for row, value in sorted(self._of_row.items())})

    def restore(self, text: str | None) -> None:
        """Know what a checkpoint says.

        Args:
            text: from `dump`; None: an older version wrote the checkpoint.
        """
        if text is None:
            self._say(f"warning: the checkpoint has no {FILE}: `refill` knows nothing of earlier steps")
        known = json.loads(text) if text is not None else {}
        self._of_row = {int(row): (groups, total) for row, (groups, total) in known.items()}


def open_memory(settings: RolloutSettings, saver: Saver, say: Callable[[str], None]) -> RefillMemory:
    """The memory of a run; with `refill` it is saved with each checkpoint.

    Args:
        settings: the recipe's `rollout` section.
        saver: of this attempt; nothing is loaded yet.
        say: prints a message to the user.
    """
    memory = RefillMemory(say)
    if settings.refill:
        saver.texts[FILE] = memory
    return memory


def spread(group: Group) -> float | None:
    """The share of pairs of rollouts whose rewards differ; None if fewer than two have a reward.

    Args:
        group: scored.
    """
    rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
    pairs = list(combinations(rewards, 2))
    return sum(first != second for first, second in pairs) / len(pairs) if pairs else None
