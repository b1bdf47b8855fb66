"""The seed of dropout is a function of (seed, step, rank) that is the same on every Python."""

from __future__ import annotations

import pytest

from trainer.training.dropout import mix_seeds


@pytest.mark.parametrize(
    ("numbers", "seed"),
    [
        # hash() of the same tuples on CPython 3.11, with which earlier versions of this project trained
        ((0, 0, 0), 3010437511937009226),
        ((0, 7, 1), -7512759699906963584),
        ((20, 3, 0), -1515961468568985672),
        ((2**61, 999_999, 63), -7215171847323879695),  # integers count modulo 2**61 - 1
    ],
)
def test_seeds_are_those_of_earlier_runs(numbers: tuple[int, ...], seed: int) -> None:
    assert mix_seeds(numbers) == seed


def test_each_step_and_rank_has_another_seed() -> None:
    seeds = {mix_seeds((seed, step, rank)) for seed in range(3) for step in range(50) for rank in range(8)}
    assert len(seeds) == 3 * 50 * 8
