"""Drawing tokens from numbers that are a function of counters.

One uniform number for each token is hashed from (seed, step, row, sample, position), so that a completion's noise does
not depend on which others are sampled beside it, and no generator has a state to save:

    key = mix(seed);  key = mix(key + (counter + 1) * GAMMA) for step, row, sample, position;  u = key >> 16, over 2**48

where `mix` is the finalizer of SplitMix64 (Steele, Lea and Flood 2014) and all is modulo 2**64.

A token is drawn by inverting the distribution function in whole numbers: q_i = floor(p_i * 2**40), the least i with
q_0 + ... + q_i > floor(u * sum(q)). Sums of whole numbers do not depend on their order, so the same numbers give the
same token on every device, which a floating cumsum on CUDA does not. Each probability is lowered by less than 2**-40;
tokens below 2**-40 are never drawn. The sum is taken over blocks of the vocabulary and then within one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

QUANTUM_BITS: Final = 40
UNIFORM_BITS: Final = 48
"""Few enough that a uniform below 1 times a total of about 2**40 rounds to less than the total in float64."""
BLOCK: Final = 256
"""Tokens of the vocabulary whose probabilities are summed first."""

_GAMMA: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB


def row_keys(seed: int, step: int, rows: Sequence[int], samples: Sequence[int], device: torch.device) -> torch.Tensor:
    """[R] int64 key of each completion's noise, from its row and its number among the row's samples."""
    assert len(rows) == len(samples)
    key = _mix(torch.tensor([_signed(seed)], device=device))
    key = _mix(_stir(key, torch.tensor([step], device=device)))
    key = _mix(_stir(key, torch.tensor(rows, device=device)))
    return _mix(_stir(key, torch.tensor(samples, device=device)))


def uniforms(keys: torch.Tensor, position: int) -> torch.Tensor:
    """[R] float64 in [0, 1): the noise of each completion's token at this position."""
    mixed = _mix(keys + _signed((position + 1) * _GAMMA))
    return _shift_right(mixed, 64 - UNIFORM_BITS).double() * 2.0**-UNIFORM_BITS


def quantize(probabilities: torch.Tensor) -> torch.Tensor:
    """[R, B * BLOCK] int64 multiples of 2**-40, zeros behind the vocabulary, from [R, V] floats."""
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
    # a sum of 0 (logits that are not finite) would point behind the last block
    block = (ends <= target).sum(-1).clamp(max=ends.shape[1] - 1)
    index = torch.arange(len(quanta), device=quanta.device)
    inside = blocks[index, block]
    before = ends[index, block] - inside.sum(-1)
    offset = (inside.cumsum(-1) + before[:, None] <= target).sum(-1).clamp(max=BLOCK - 1)
    return block * BLOCK + offset


def truncate(quanta: torch.Tensor, *, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Zero what top_k, then top_p of the rest, then min_p cut off; values that say off cost nothing.

    Args:
        quanta: [R, V] from `quantize`.
        top_k: keep the k likeliest tokens, of equals the first; 0 is off.
        top_p: keep the fewest likeliest tokens that together reach this share; 1 is off.
        min_p: keep tokens at least so likely relative to the likeliest; 0 is off.
    """
    is_short = 0 < top_k < quanta.shape[1]
    if is_short or top_p < 1:
        # stable: of equally likely tokens the one with the smaller id is kept, on every device
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
    """Without the sign, which torch's shift would copy in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 reads them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
