"""Sums that packs have measured, read from the device all at once; for the learner only.

Reading a number from a GPU waits until everything queued before it has run, and nothing is queued meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch

from trainer.model.batch import Batch


@final
class PackSums:
    """The sums of a pack, which may still be on the device."""

    def __init__(self, owner: Measured, batch: Batch, sums: Mapping[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Keep what was measured.

        Args:
            owner: reads it.
            batch: the pack.
            sums: by name, `loss` among them.
            loss: [N] unreduced.
        """
        self._owner = owner
        self.names = list(sums)
        self.sums = torch.stack([value.detach().double() for value in sums.values()])
        """[M], in order of the names."""
        self.num_trained, self.sources = batch.num_trained, batch.sources
        self._is_finite, self._sequence_ids = loss.detach().isfinite(), batch.sequence_ids
        self.values: dict[str, float] | None = None
        """The sums by name and `tokens`, once they were read."""

    def read(self) -> Mapping[str, float]:
        """The sums by name and `tokens`, the number of trained tokens."""
        if self.values is None:
            self._owner.read()
        assert self.values is not None
        return self.values

    def bad_sources(self) -> set[str]:
        """File and line of each row of the pack with a loss that is not finite."""
        assert self.values is not None
        if math.isfinite(self.values["loss"]):
            return set()
        return {self.sources[sequence] for sequence in self._sequence_ids[~self._is_finite].unique().tolist()}


@final
class Measured:
    """What the packs of an update have measured."""

    def __init__(self) -> None:
        """Begin without packs."""
        self._packs: list[PackSums] = []

    def add(self, batch: Batch, sums: Mapping[str, torch.Tensor], loss: torch.Tensor) -> PackSums:
        """Keep the sums of a pack; see `PackSums`."""
        self._packs.append(PackSums(self, batch, sums, loss))
        return self._packs[-1]

    def read(self, last: torch.Tensor | None = None) -> float:
        """Read the sums of all packs that were not read yet, in a single copy to the host.

        Args:
            last: a number that is read with them.

        Returns:
            That number; 0 where none was given.
        """
        waiting = [pack for pack in self._packs if pack.values is None]
        parts = [pack.sums for pack in waiting]
        parts += [] if last is None else [last.double()[None]]
        if not parts:
            return 0.0
        numbers = torch.cat(parts).tolist()
        for pack in waiting:
            own, numbers = numbers[: len(pack.names)], numbers[len(pack.names) :]
            pack.values = {**dict(zip(pack.names, own, strict=True)), "tokens": float(pack.num_trained)}
        return 0.0 if last is None else float(numbers[0])

    def totals(self) -> dict[str, float]:
        """Sums over all packs, in their order."""
        totals: dict[str, float] = {}
        for pack in self._packs:
            for name, value in pack.read().items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def bad_sources(self) -> set[str]:
        """File and line of each row with a loss that is not finite."""
        return {source for pack in self._packs for source in pack.bad_sources()}

    def clear(self) -> None:
        """Begin again without packs."""
        self._packs = []
