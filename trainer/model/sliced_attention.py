"""Attention of a rank's slice of a pack to the keys and values of all ranks of its context group.

Keys and values are gathered in every layer (grouped-query keys are small beside the activations of a layer), and their
gradients are summed over the ranks. The mask is the one of the whole pack, restricted to the queries of this rank.

CPU: each piece of a sequence that lies in a chunk of this rank attends to itself causally, and to the tokens of its
sequence before it. Long pieces without window, soft cap and sinks run the fused kernel on both parts. With log-sum-exps
l_1, l_2 of the scores of the parts, and outputs O_1, O_2:

    l = log(exp(l_1) + exp(l_2)),  O = exp(l_1 - l) O_1 + exp(l_2 - l) O_2

and the kernel's backward pass of each part, given O and l of both, returns the part's gradients (arXiv 2307.08691, the
backward pass reads P = exp(S - l) only). All others run eager attention. GPU: FlexAttention with this rank's rows of
the block mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch.autograd.function import once_differentiable

from trainer.config.unsupported import CONTEXT_TREES
from trainer.errors import ModelError
from trainer.model.eager_attention import AttentionOptions, KeysValues, eager_attention
from trainer.model.flex import flex_packed, slice_mask_of
from trainer.model.layout import SlicedLayout

EAGER_MAX_CELLS: Final = 384 * 384
"""On a CPU, pieces with up to this many scores use eager attention, which keeps them."""


def sliced_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SlicedLayout, options: AttentionOptions
) -> torch.Tensor:
    """[1, t, H, D] attention of this rank's tokens to those of all ranks; every rank of the group calls it.

    Args:
        query: [1, H, t, D] of this rank.
        key: [1, H_kv, t, D] of this rank.
        value: [1, H_kv, t, D] of this rank.
        layout: of the pack and of the slice.
        options: of the layer's attention.

    Raises:
        ModelError: sequences of the pack share a prefix.
    """
    keys, values = _gathered(key, value, layout)
    if query.device.type != "cpu":
        return flex_packed(query, keys, values, slice_mask_of(layout, options.window), options)
    outputs = []
    for piece in _pieces(layout, options.window):
        rows, far = slice(piece.row, piece.row + piece.length), slice(piece.first_key, piece.begin)
        own = slice(piece.begin, piece.begin + piece.length)
        before = (keys[:, :, far], values[:, :, far]) if piece.first_key < piece.begin else None
        outputs.append(_attend(query[:, :, rows], keys[:, :, own], values[:, :, own], before, options))
    return torch.cat(outputs, 2).transpose(1, 2)


def _gathered(key: torch.Tensor, value: torch.Tensor, layout: SlicedLayout) -> KeysValues:
    """[1, H_kv, T, D] keys and values of the whole pack, in its order, from one exchange."""
    own = torch.cat([key[0], value[0]], -1).transpose(0, 1)
    chunks = layout.group.gathered(own).unflatten(0, (2 * layout.group.size, layout.chunk_tokens))
    whole = torch.cat([chunks[place] for place in layout.chunk_order]).transpose(0, 1)[None]
    return whole[..., : key.shape[-1]], whole[..., key.shape[-1] :]


@final
@dataclass(frozen=True)
class _Piece:
    """Neighbouring tokens of one sequence in one chunk of this rank."""

    row: int
    """First of them in the slice."""
    begin: int
    """First of them in the pack."""
    length: int
    first_key: int
    """First token of the pack that any of them attends to."""


def _pieces(layout: SlicedLayout, window: int | None) -> Iterator[_Piece]:
    """The pieces of a slice, in its order.

    Args:
        layout: of the slice.
        window: of the layer; the pieces are then about as long as the window, so that few hidden scores are computed.

    Raises:
        ModelError: sequences of the pack share a prefix.
    """
    lengths = [prefix for prefix, _ in layout.whole.trees] + [layout.whole.padding]
    if any(branches for _, branches in layout.whole.trees):
        raise ModelError(CONTEXT_TREES)
    size = layout.chunk_tokens
    for place, chunk in enumerate(layout.chunks):
        chunk_begin, start = chunk * size, 0
        for length in lengths:
            begin, end = max(start, chunk_begin), min(start + length, chunk_begin + size)
            step = max(1, end - begin) if window is None else max(window, 384)
            for at in range(begin, end, step):
                first_key = start if window is None else max(start, at - window + 1)
                yield _Piece(place * size + at - chunk_begin, at, min(step, end - at), first_key)
            start += length


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: KeysValues | None, options: AttentionOptions
) -> torch.Tensor:
    """[1, H, L, D] attention of a piece to itself and to what is before it."""
    num_keys = key.shape[2] + (0 if before is None else before[0].shape[2])
    is_plain = options == AttentionOptions(options.scaling) and key.shape[-1] == value.shape[-1]
    if not is_plain or query.shape[2] * num_keys <= EAGER_MAX_CELLS:
        return eager_attention(query, key, value, before, options)
    grouped = query[0].unflatten(0, (key.shape[1], -1))  # [H_kv, q, L, D]: key heads become the batch
    parts = [each.transpose(0, 1).expand(-1, grouped.shape[1], -1, -1) for each in (key, value, *(before or ()))]
    far = (None, None) if before is None else parts[2:]
    output: torch.Tensor = _TwoParts.apply(grouped, *parts[:2], *far, options.scaling)  # type: ignore[no-untyped-call]
    return output.flatten(0, 1)[None]


class _TwoParts(torch.autograd.Function):
    """The fused kernel on a causal part and on a part that is seen whole; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before_key: torch.Tensor | None,
        before_value: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(query, key, value, 0.0, True, scale=scaling)
        if before_key is not None:
            far, far_lse = kernel(query, before_key, before_value, 0.0, False, scale=scaling)
            own_lse, lse = lse, torch.logaddexp(lse, far_lse)
            parts = ((out, own_lse), (far, far_lse))
            out = sum(part * (of_part - lse).exp()[..., None] for part, of_part in parts).to(query.dtype)
        ctx.save_for_backward(query, key, value, before_key, before_value, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, before_key, before_value, out, lse = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        def gradients(keys: torch.Tensor, values: torch.Tensor, is_causal: bool) -> tuple[torch.Tensor, ...]:
            found: tuple[torch.Tensor, ...] = kernel(
                grad, query, keys, values, out, lse, 0.0, is_causal, scale=ctx.scaling
            )
            return found

        of_query, of_key, of_value = gradients(key, value, True)
        of_before_key = of_before_value = None
        if before_key is not None:
            far, of_before_key, of_before_value = gradients(before_key, before_value, False)
            of_query = of_query + far
        return of_query, of_key, of_value, of_before_key, of_before_value, None
