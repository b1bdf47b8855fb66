"""Counter-based random numbers, and exact sampling of tokens from them.

One uniform number per token is hashed from (seed, step, row, sample, position). So the noise of a completion does not
depend on which completions are sampled in the same batch, and there is no generator state to save:

    key = mix(seed);  key = mix(key + (counter + 1) * GAMMA) for step, row, sample, position;  u = key >> 16, over 2**48

Turns of a conversation after the first one continue with key = mix(~key + turn * GAMMA), before the position.

where `mix` is the finalizer of SplitMix64 (Steele, Lea and Flood 2014) and arithmetic is modulo 2**64.

A token is drawn by inverting the distribution function in integers: q_i = floor(p_i * 2**40), and the token is the
smallest i with q_0 + ... + q_i > floor(u * sum(q)). Integer sums do not depend on the order of summation, so equal
inputs give equal tokens on every device; a floating-point cumsum on CUDA does not. Each probability is lowered by less
than 2**-40, and tokens below 2**-40 are never drawn. The sum is taken over blocks of the vocabulary, then within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

QUANTUM_BITS: Final = 40
UNIFORM_BITS: Final = 48
"""Few enough that u < 1 times a total of about 2**40 is below the total after rounding to float64."""
BLOCK: Final = 256
"""Number of neighbouring tokens whose probabilities are summed first."""

_GAMMA: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB


def row_keys(seed: int, step: int, rows: Sequence[int], samples: Sequence[int], device: torch.device) -> torch.Tensor:
    """[R] int64 noise key of each completion.

    Args:
        seed: of the run.
        step: of the training.
        rows: row index of each completion.
        samples: index of each completion among the samples of its row.
        device: of the result.
    """
    assert len(rows) == len(samples)
    key = _mix(torch.tensor([_signed(seed)], device=device))
    key = _mix(_stir(key, torch.tensor([step], device=device)))
    key = _mix(_stir(key, torch.tensor(rows, device=device)))
    return _mix(_stir(key, torch.tensor(samples, device=device)))


def turn_keys(keys: torch.Tensor, turns: Sequence[int]) -> torch.Tensor:
    """[R] noise keys of a turn of each completion's conversation; turn 0 keeps its key.

    Args:
        keys: [R] from `row_keys`.
        turns: from 0.
    """
    turn = torch.tensor(turns, device=keys.device)
    later = _mix(~keys + turn * _signed(_GAMMA))
    return torch.where(turn == 0, keys, later)


def uniforms(keys: torch.Tensor, position: int) -> torch.Tensor:
    """[R] float64 in [0, 1): the noise for each completion's token at this position."""
    mixed = _mix(keys + _signed((position + 1) * _GAMMA))
    return _shift_right(mixed, 64 - UNIFORM_BITS).double() * 2.0**-UNIFORM_BITS


def uniforms_at(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[R] float64 in [0, 1): like `uniforms`, with a position of its own for each completion.

    Args:
        keys: [R] int64 from `row_keys`.
        positions: [R] int64.
    """
    return _shift_right(_mix(_stir(keys, positions)), 64 - UNIFORM_BITS).double() * 2.0**-UNIFORM_BITS


def quantize(probabilities: torch.Tensor) -> torch.Tensor:
    """[R, B * BLOCK] int64 in units of 2**-40, zero beyond the vocabulary, from [R, V] probabilities."""
    rows, vocab = probabilities.shape
    width = -(-vocab // BLOCK) * BLOCK
    scaled = probabilities * 2.0**QUANTUM_BITS
    if width == vocab:
        return scaled.to(torch.int64)
    quanta = torch.zeros(rows, width, dtype=torch.int64, device=probabilities.device)
    quanta[:, :vocab] = scaled
    return quanta


def draw(quanta: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[R] tokens.

    Args:
        quanta: [R, B * BLOCK] from `quantize`, truncated or not.
        uniform: [R] float64 in [0, 1).
    """
    blocks = quanta.view(len(quanta), -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    total = ends[:, -1]
    target = (uniform * total).to(torch.int64)[:, None]
    # a sum of 0, from logits that are not finite, would point beyond the last block
    block = (ends <= target).sum(-1).clamp(max=ends.shape[1] - 1)
    index = torch.arange(len(quanta), device=quanta.device)
    inside = blocks[index, block]
    before = ends[index, block] - inside.sum(-1)
    offset = (inside.cumsum(-1) + before[:, None] <= target).sum(-1).clamp(max=BLOCK - 1)
    return block * BLOCK + offset


def truncate(quanta: torch.Tensor, *, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Set to zero what top_k, then top_p of the rest, then min_p exclude; a disabled filter costs nothing.

    Args:
        quanta: [R, V] from `quantize`.
        top_k: keep the k most likely tokens, the smaller id on a tie; 0 is off.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least top_p; 1 is off.
        min_p: keep tokens whose probability is at least min_p times the highest one; 0 is off.
    """
    is_short = 0 < top_k < quanta.shape[1]
    if is_short or top_p < 1:
        # stable: on a tie every device keeps the smaller id
        values, order = quanta.sort(dim=-1, descending=True, stable=True)
        if is_short:
            values, order = values[:, :top_k], order[:, :top_k]
        if top_p < 1:
            ends = values.cumsum(-1)
            values = values.where(ends - values < top_p * ends[:, -1:].double(), 0)
        quanta = torch.zeros_like(quanta).scatter_(1, order, values)
    if min_p > 0:
        quanta = quanta.where(quanta >= min_p * quanta.amax(-1, keepdim=True).double(), 0)
    return quanta


def _stir(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    return key + (counter + 1) * _signed(_GAMMA)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(_FIRST)
    value = (value ^ _shift_right(value, 27)) * _signed(_SECOND)
    return value ^ _shift_right(value, 31)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own shift copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as an int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
