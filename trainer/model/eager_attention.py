"""Eager attention over rows of one length, faster than SDPA for short rows on a CPU.

    S = s Q [K_before, K]^T + mask,  P = softmax(S),  O = P [V_before, V]
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = s dS K,  dK = s dS^T Q       (arXiv 2205.14135, B)

`before` is the shared prefix of all rows, stored once: the prompt of several completions. The softmax is float32; P is
kept for the backward pass in the compute dtype only, where autograd would keep both. Layers with soft caps or sinks use
autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch.autograd.function import once_differentiable

KeysValues = tuple[torch.Tensor, torch.Tensor]


@final
@dataclass(frozen=True)
class AttentionOptions:
    """Properties of a layer's attention."""

    scaling: float
    """Factor of the scores."""
    window: int | None = None
    """A token attends to this many tokens, itself included."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: torch.Tensor | None = None
    """[H] learned logits in the softmax that have no value."""


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: KeysValues | None, options: AttentionOptions
) -> torch.Tensor:
    """Causal attention of each row to itself and to the shared prefix.

    Args:
        query: [R, H, L, D].
        key: [R, H_kv, L, D].
        value: [R, H_kv, L, D].
        before: keys and values of the shared prefix, [1, H_kv, P, D] each; None if there is none.
        options: properties of the layer's attention.

    Returns:
        [R, H, L, D].
    """
    if options.softcap is None and options.sinks is None:
        output: torch.Tensor = _Attention.apply(query, key, value, *(before or (None, None)), options)  # type: ignore[no-untyped-call]
        return output
    heads, length = query.shape[1:3]
    folded = _folded(query, key.shape[1])
    scores = _scores(folded, key, before) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.unflatten(2, (-1, length)) + _mask(length, scores, options.window)
    if options.sinks is not None:
        column = options.sinks.to(scores.dtype).view(1, key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    num_keys = scores.shape[-1] - (options.sinks is not None)
    weights = _softmax(scores)[..., :num_keys].flatten(2, 3)
    return _read(weights, value, before).view(len(query), heads, length, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before_key: torch.Tensor | None,
        before_value: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        folded = _folded(query, key.shape[1])
        before = None if before_key is None or before_value is None else (before_key, before_value)
        scores = _scores(folded, key, before).mul_(options.scaling)
        scores.unflatten(2, (-1, length)).add_(_mask(length, scores, options.window))
        weights = _softmax(scores)
        ctx.save_for_backward(folded, key, value, before_key, before_value, weights)
        ctx.scaling = options.scaling
        return _read(weights, value, before).view(rows, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded, key, value, before_key, before_value, weights = ctx.saved_tensors
        shape, scaling = grad.shape, ctx.scaling
        grad = _folded(grad, key.shape[1])
        # dP = dO V^T has the form of the scores S = Q K^T, so `_scores` computes it with V in the place of K. It reads
        # the first of the pair `before` only: the second is there to fill the slot.
        before = None if before_key is None else (before_value, before_value)
        grad_weights = _scores(grad, value, before)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        split = weights.shape[-1] - key.shape[2]
        own = grad_scores[..., split:]
        grad_query = own @ key
        grad_key = (own.transpose(-1, -2) @ folded).mul_(scaling)
        grad_value = weights[..., split:].transpose(-1, -2) @ grad
        grad_before_key = grad_before_value = None
        if split:
            far = grad_scores[..., :split]
            grad_query += far @ before_key
            grad_before_key = (far.transpose(-1, -2) @ folded).sum(0, keepdim=True).mul_(scaling)
            grad_before_value = (weights[..., :split].transpose(-1, -2) @ grad).sum(0, keepdim=True)
        grad_query = grad_query.mul_(scaling).view(*shape[:-1], -1)
        return grad_query, grad_key, grad_value, grad_before_key, grad_before_value, None


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[L, n] bool: which keys each query attends to; the last L keys are those of the queries.

    >>> causal_mask(2, 3, None, torch.device("cpu")).tolist()
    [[True, True, False], [True, True, True]]

    Args:
        num_queries: L.
        num_keys: n, at least L.
        window: of the attention; None is no window.
        device: of the result.
    """
    position = torch.arange(num_keys, device=device)
    distance = position[num_keys - num_queries :, None] - position[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _folded(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[R, H, L, D] to [R, H_kv, q, D]: the queries of all heads that share a key head, one after another."""
    return tensor.reshape(len(tensor), kv_heads, -1, tensor.shape[-1])


def _scores(folded: torch.Tensor, key: torch.Tensor, before: KeysValues | None) -> torch.Tensor:
    """[R, H_kv, q, P + L] products with all keys."""
    own = folded @ key.transpose(-1, -2)
    return own if before is None else torch.cat([folded @ before[0].transpose(-1, -2), own], -1)


def _read(weights: torch.Tensor, value: torch.Tensor, before: KeysValues | None) -> torch.Tensor:
    """[R, H_kv, q, D] weighted sums of all values."""
    split = weights.shape[-1] - value.shape[2]
    out = weights[..., split:] @ value
    return out if before is None else out + weights[..., :split] @ before[1]


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _mask(length: int, scores: torch.Tensor, window: int | None) -> torch.Tensor:
    """[L, P + L] zero where a query attends, minus infinity elsewhere; the window includes the prefix."""
    num_keys = scores.shape[-1]
    hidden = ~causal_mask(length, num_keys, window, scores.device)
    return scores.new_zeros(length, num_keys).masked_fill_(hidden, float("-inf"))
