"""Attention written out, over rows of one length: for CPUs, where it beats the fused kernel on short rows.

    S = s Q [K_before, K]^T + mask,  P = softmax(S),  O = P [V_before, V]
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = s dS K,  dK = s dS^T Q       (arXiv 2205.14135, B)

`before` is what all rows go on from, once: a prompt that stands before each of its completions. The softmax is float32,
and P is kept in the compute dtype for the backward pass, where autograd keeps both. Soft caps and sinks are autograd's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch.autograd.function import once_differentiable

KeysValues = tuple[torch.Tensor, torch.Tensor]


@final
@dataclass(frozen=True)
class AttentionForm:
    """What a layer's attention has besides softmax(QK)V."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """[H] learned logits that take weight and give nothing."""


def explicit_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: KeysValues | None, form: AttentionForm
) -> torch.Tensor:
    """Causal attention of each row to itself and to what stands before all rows.

    Args:
        query: [R, H, L, D].
        key: [R, H_kv, L, D].
        value: [R, H_kv, L, D].
        before: keys and values of the common prefix, [1, H_kv, P, D] each; None where rows begin by themselves.
        form: what the layer's attention has.

    Returns:
        [R, H, L, D].
    """
    if form.softcap is None and form.sinks is None:
        output: torch.Tensor = _Attention.apply(query, key, value, *(before or (None, None)), form)  # type: ignore[no-untyped-call]
        return output
    heads, length = query.shape[1:3]
    folded = _folded(query, key.shape[1])
    scores = _scores(folded, key, before) * form.scaling
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    scores = scores.unflatten(2, (-1, length)) + _mask(length, scores, form.window)
    if form.sinks is not None:
        column = form.sinks.to(scores.dtype).view(1, key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    num_keys = scores.shape[-1] - (form.sinks is not None)
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
        form: AttentionForm,
    ) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        folded = _folded(query, key.shape[1])
        before = None if before_key is None or before_value is None else (before_key, before_value)
        scores = _scores(folded, key, before).mul_(form.scaling)
        scores.unflatten(2, (-1, length)).add_(_mask(length, scores, form.window))
        weights = _softmax(scores)
        ctx.save_for_backward(folded, key, value, before_key, before_value, weights)
        ctx.scaling = form.scaling
        return _read(weights, value, before).view(rows, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded, key, value, before_key, before_value, weights = ctx.saved_tensors
        shape, scaling = grad.shape, ctx.scaling
        grad = _folded(grad, key.shape[1])
        before = None if before_key is None else (before_value, before_value)
        grad_weights = _scores(grad, value, before)  # dO V^T is a product of the same form
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
    """[L, n] bool: what each query may see of the keys, of which the last L are its own."""
    position = torch.arange(num_keys, device=device)
    distance = position[num_keys - num_queries :, None] - position[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _folded(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[R, H, L, D] to [R, H_kv, q, D]: the query heads of a key head below each other."""
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
    """[L, P + L] zero where a query sees, minus infinity elsewhere; the window reaches back over the prefix."""
    num_keys = scores.shape[-1]
    hidden = ~causal_mask(length, num_keys, window, scores.device)
    return scores.new_zeros(length, num_keys).masked_fill_(hidden, float("-inf"))
