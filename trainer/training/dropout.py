"""The seed of dropout in each step, a function of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from trainer.config.recipe import Recipe

BITS: Final = 64
MASK: Final = 2**BITS - 1
PRIME_1: Final = 11400714785074694791
PRIME_2: Final = 14029467366897019727
PRIME_5: Final = 2870177450012600261
LENGTH_SALT: Final = 3527539
MODULUS: Final = 2**61 - 1


def seed_dropout(recipe: Recipe, step: int, rank: int) -> None:
    """Seed torch's generators for a step, if the adapter has dropout.

    Args:
        recipe: seed and adapter.
        step: steps made so far.
        rank: of this process; ranks draw different masks.
    """
    if recipe.lora is not None and recipe.lora.dropout > 0:
        torch.manual_seed(mix_seeds((recipe.seed, step, rank)))


def mix_seeds(numbers: Sequence[int]) -> int:
    """Mix non-negative integers into one signed 64-bit seed.

    Earlier versions used `hash((seed, step, rank))`, whose values Python does not guarantee. This function returns the
    same values on every Python: a simplified xxHash64 without its final avalanche, as CPython 3.8 to 3.13 hash tuples.

    >>> mix_seeds((0, 7, 1))
    -7512759699906963584
    """
    state = PRIME_5
    for number in numbers:
        state = (state + number % MODULUS * PRIME_2) & MASK
        state = ((state << 31) | (state >> (BITS - 31))) & MASK
        state = (state * PRIME_1) & MASK
    state = (state + (len(numbers) ^ PRIME_5 ^ LENGTH_SALT)) & MASK
    return state - 2**BITS if state >= 2 ** (BITS - 1) else state
