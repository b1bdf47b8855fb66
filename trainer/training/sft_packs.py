"""The packs of SFT steps: a function of the step alone, so that they can be made before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import final

from trainer.config.recipe import Recipe
from trainer.data.order import rows_of_step
from trainer.data.token_table import TokenTable
from trainer.distributed.world import World
from trainer.model.batch import Batch, split_evenly
from trainer.training.prefetch import Prefetched, prefetched
from trainer.training.row_trees import plan_packs


@final
@dataclass(frozen=True)
class Step:
    """What a step trains on."""

    num_tokens: int
    """Of all ranks."""
    denominator: float
    """This rank's part of the divisor of the summed loss."""
    num_packs: int
    """Of this rank."""


@final
class StepPacks:
    """The packs of one step after the other, on this rank.

    On a GPU they are made by a thread, some before their step begins. A checkpoint records the steps made, and the rows
    of a step follow from its number: what was made ahead and not used is lost with the process and made again.
    """

    def __init__(
        self, recipe: Recipe, rows: TokenTable, world: World, budget: int, *, steps: range, excluded: Collection[int]
    ) -> None:
        """Begin with the first step.

        Args:
            recipe: order and number of rows.
            rows: tokenized.
            world: the ranks.
            budget: maximum tokens of a pack of several sequences.
            steps: those to be made, in order.
            excluded: rows that are left out.
        """
        self._recipe, self._rows, self._world, self._budget = recipe, rows, world, budget
        self._excluded = excluded
        self._made = prefetched(self._make(steps), world.device)

    def __enter__(self) -> StepPacks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._made, Prefetched):
            self._made.close()

    def next_step(self, moved: Callable[[], None]) -> tuple[Step, Iterator[Batch]]:
        """The next step and its packs, which are all used before the step after it is asked for.

        Args:
            moved: called before each pack.
        """
        step = next(self._made)
        assert isinstance(step, Step)
        return step, _with_dummies(self._packs(step.num_packs), step.num_packs, self._world, moved)

    def _packs(self, num_packs: int) -> Iterator[Batch]:
        for pack in islice(self._made, num_packs):
            assert isinstance(pack, Batch)
            yield pack

    def _make(self, steps: range) -> Iterator[Step | Batch]:
        recipe, rows, world = self._recipe, self._rows, self._world
        for number in steps:
            chosen = rows_of_step(recipe.seed, number, recipe.rows_per_step, rows.num_rows, self._excluded)
            sequences = rows.sequences_of(chosen)
            own = of_rank(rows, sequences, world)
            groups = plan_packs(rows, own, self._budget, may_share=world.context is None)
            counted = own if world.counts_share else ()
            denominator = sum(sum(rows.sequence(each).inputs.weights) for each in counted)
            yield Step(sum(rows.lengths(sequences)), denominator, len(groups))
            for group in groups:
                yield Batch.pack_trees([tree.read(rows) for tree in group], world.device, context=world.context)


def held_out_packs(rows: TokenTable, world: World, budget: int, moved: Callable[[], None]) -> Iterator[Batch]:
    """All rows of a table in packs, this rank's part; as many packs on each rank if the base is sharded.

    Args:
        rows: tokenized.
        world: the ranks.
        budget: maximum tokens of a pack of several sequences.
        moved: called before each pack.
    """
    own = of_rank(rows, range(rows.counts.num_sequences), world)
    groups = plan_packs(rows, own, budget, may_share=world.context is None)
    packs = (
        Batch.pack_trees([tree.read(rows) for tree in group], world.device, context=world.context) for group in groups
    )
    return _with_dummies(packs, len(groups), world, moved)


def _with_dummies(packs: Iterator[Batch], num_packs: int, world: World, moved: Callable[[], None]) -> Iterator[Batch]:
    """The packs, and dummies up to the number of the rank with most packs if the base is sharded."""
    # Asked before the first pack: a rank that asks after its last one waits for ranks that wait for it in a gather.
    (num_dummies,) = world.num_dummies([num_packs])

    def each() -> Iterator[Batch]:
        for _ in range(num_packs):
            moved()
            yield next(packs)
        for _ in range(num_dummies):
            yield Batch.dummy(world.device, world.context)

    return each()


def of_rank(rows: TokenTable, sequences: Sequence[int], world: World) -> list[int]:
    """The sequences that this rank computes, balanced by tokens; those of a row stay together.

    Ranks that compute packs together have the same sequences.

    Args:
        rows: have their lengths.
        sequences: of all ranks.
        world: the ranks.
    """
    units = rows.by_row(sequences)
    parts = split_evenly([sum(rows.lengths(unit)) for unit in units], world.num_shares)
    return [number for index in parts[world.share] for number in units[index]]
