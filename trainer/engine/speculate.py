"""Speculative decoding: tokens that may come next are proposed, and computed together.

Prompt look-up proposes those that followed the same words before (arXiv:2304.04487); `draft` those of a smaller model.

The model computes the next token and the proposed ones in one step. Each token is then drawn as always, with the noise
of its position; while a draw equals the proposal, the next one of the step is valid too. So the tokens are those of
decoding one by one, as far as the sums of both steps round equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Final, final

SIZES: Final = (4, 2)
"""Tokens that must have occurred before; the longer match is preferred."""
FIRST: Final = 4
"""Tokens of the first proposal; it doubles while all are accepted."""
MOST: Final = 16
LONGEST_PAUSE: Final = 32
"""Steps without a proposal after several in a row that were wrong at once."""


@final
class Pace:
    """How many tokens one kind of proposal has, and when none is made, by what became of earlier ones."""

    def __init__(self) -> None:
        """Begin with the first length."""
        self.size = FIRST
        self._pause = self._next_pause = 0

    def rests(self) -> bool:
        """Whether to propose nothing in this step, because proposals were wrong lately."""
        if self._pause:
            self._pause -= 1
            return True
        return False

    def learn(self, proposed: int, accepted: int) -> None:
        """Adapt the length of proposals to what became of one.

        Args:
            proposed: its tokens.
            accepted: those that were drawn.
        """
        if accepted == proposed:
            self.size = min(MOST, 2 * self.size)
        elif accepted:
            self.size = max(2, min(self.size, accepted + 1))
        if accepted:
            self._next_pause = 0
        else:
            self.size = FIRST
            self._next_pause = min(LONGEST_PAUSE, max(1, 2 * self._next_pause))
            self._pause = self._next_pause


@final
class PromptLookup:
    """Proposes the tokens of one sequence."""

    def __init__(self) -> None:
        """Begin without tokens."""
        self._ids: list[int] = []
        self._num_indexed = 0
        self._ends: dict[tuple[int, ...], int] = {}
        self.pace = Pace()

    def propose(self, prompt: Sequence[int], drawn: Sequence[int], most: int) -> list[int]:
        """Tokens that may come next; none where nothing was found, or where proposals were wrong lately.

        Args:
            prompt: of the sequence.
            drawn: so far.
            most: the longest proposal.
        """
        if self.pace.rests():
            return []
        self._ids += drawn[len(self._ids) - len(prompt) :] if self._ids else [*prompt, *drawn]
        ids = self._ids
        for end in range(max(self._num_indexed, 1), len(ids)):  # not the present end itself
            for size in SIZES:
                if end >= size:
                    self._ends[tuple(ids[end - size : end])] = end
        self._num_indexed = len(ids)
        for size in SIZES:
            earlier = self._ends.get(tuple(ids[-size:])) if len(ids) > size else None
            if earlier is not None:  # a text that repeats itself goes on so
                return list(islice(cycle(ids[earlier:]), min(most, self.pace.size)))
        return []
