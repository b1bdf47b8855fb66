"""The packs of sft rows: a row of several sequences becomes a tree that stores what they share once. For sft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from trainer.data.token_table import TokenTable
from trainer.model.batch import fill
from trainer.model.trees import Tree, grow_forks


@final
@dataclass(frozen=True)
class PlannedTree:
    """A tree whose sequences are not read yet."""

    numbers: tuple[int, ...]
    """Of its sequences in the table."""
    num_tokens: int
    prefix: int
    forks: tuple[int, ...] = ()

    def read(self, rows: TokenTable) -> Tree:
        """The tree."""
        return Tree(tuple(map(rows.sequence, self.numbers)), self.prefix, self.forks)


def plan_packs(
    rows: TokenTable, numbers: Sequence[int], budget: int, *, may_share: bool = True
) -> list[list[PlannedTree]]:
    """The trees of each micro-batch.

    Args:
        rows: of one sequence are not read, the others are, one row at a time.
        numbers: of the sequences; those of a row in a row.
        budget: tokens of a micro-batch; a longer sequence is alone.
        may_share: whether sequences of a row may share a prefix; otherwise each is a tree of its own.
    """
    units = rows.by_row(numbers) if may_share else [[number] for number in numbers]
    trees = [tree for unit in units for tree in _planned(rows, unit, budget)]
    return [[trees[index] for index in group] for group in fill([tree.num_tokens for tree in trees], budget)]


def _planned(rows: TokenTable, unit: Sequence[int], budget: int) -> Iterator[PlannedTree]:
    if len(unit) == 1:
        (length,) = rows.lengths(unit)
        yield PlannedTree(tuple(unit), length, length)
        return
    sequences = [rows.sequence(number) for number in unit]
    number_of = {id(sequence): number for sequence, number in zip(sequences, unit, strict=True)}
    for tree in grow_forks(sequences, budget):
        members = tuple(number_of[id(sequence)] for sequence in tree.sequences)
        yield PlannedTree(members, tree.num_tokens, tree.prefix, tree.forks)
