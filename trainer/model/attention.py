"""Attention over packed sequences.

A pack is a flat row of T tokens: S sequences end to end, or behind one copy of their common prefix (layout.py). A token
attends to itself and to earlier tokens of its own sequence. The model's attention implementation is set to
`PACKED_ATTENTION`, which transformers calls in every layer; the layout of the pack is passed as the keyword `packed`.
No mask function is registered for the name, so transformers builds no mask.

CPU: sequences are gathered into right-padded rows of similar length, which a causal kernel handles without a mask.
Up to `EAGER_MAX_TOKENS` eager attention (eager_attention.py) is faster than SDPA (docs/log.md), above it SDPA runs.
GPU: FlexAttention with a document block mask; no dense mask is built. In compiled layers, FlashAttention-4 computes
packs where it is installed and passes its test (flash_choice.py).

With context parallelism a `SlicedLayout` is passed: this rank has some of the tokens of a pack (sliced_attention.py).

Sampling passes a `CachedLayout`: first with the pack of the prompts, whose keys and values are stored, then for one
token of each row at a time. In later turns of conversations the first pack has only what is new (tail_attention.py).
The rows of a prompt read its keys and values in one matrix product, and their own in a
second one; one softmax covers both parts, so the result is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.config.unsupported import ATTENTION_DROPOUT
from trainer.errors import ModelError
from trainer.model.eager_attention import AttentionOptions, causal_mask, eager_attention
from trainer.model.flash_attention import attend_flash
from trainer.model.flash_choice import AttentionKind
from trainer.model.flex import FlexLayout, attend_flex, flex_packed
from trainer.model.kv_cache import KeyValueCache, LayerCache
from trainer.model.layout import CachedLayout, PackedLayout, SlicedLayout
from trainer.model.sliced_attention import sliced_attention
from trainer.model.tail_attention import tail_attention

PACKED_ATTENTION: Final = "tunesmith_packed"
EAGER_MAX_TOKENS: Final = 384
"""On a CPU, rows up to this length use eager attention."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the layer's attention module.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D].
        attention_mask: must be None; a model that builds its own masks is refused.
        scaling: factor of the scores; 1 / sqrt(D) when None.
        dropout: attention dropout, not supported.
        **kwargs: `packed`, and the layer's `sliding_window`, `softcap` and `s_aux` (sinks), if any.

    Returns:
        [1, T, H, D], and None for the weights.

    Raises:
        ModelError: the layer needs what packed attention does not support.
    """
    layout = kwargs.get("packed")
    if isinstance(layout, FlexLayout):  # inside a compiled layer: every refusal below was made by an earlier pass
        return _in_compiled_layer(query, key, value, layout, _options(query, scaling, kwargs)), None
    if not isinstance(layout, PackedLayout | CachedLayout | SlicedLayout):
        raise ModelError(f"{type(module).__name__} does not pass the pack's layout to attention: model not supported")
    if attention_mask is not None or query.shape[0] != 1:
        raise ModelError(f"{type(module).__name__} builds a mask of its own: packed training would leak")
    if dropout:
        raise ModelError(ATTENTION_DROPOUT)
    options = _options(query, scaling, kwargs)
    if options.window is None:
        _refuse_hidden_window(module, layout)
    if isinstance(layout, CachedLayout):
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layout.tails is not None:
            kept = layout.cache.keep_tails(layer, key, value, layout.tails)
            return tail_attention(query, kept, layout.tails, options), None
        if layout.prompts is None:
            return _cached(query, layout.cache.append(layer, key, value), layout.cache, options), None
        layout.cache.keep_prompts(layer, key, value)
        layout = layout.prompts
    if key.shape[2] != layout.num_tokens:
        raise ModelError(f"{type(module).__name__} attends to other tokens than the pack's: model not supported")
    if isinstance(layout, SlicedLayout):
        return sliced_attention(query, key, value, layout, options), None
    layout.kinds.add(AttentionKind.of(query, key, value, options))
    attend = _bucketed if query.device.type == "cpu" else attend_flex
    return attend(query, key, value, layout, options), None


def _in_compiled_layer(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: FlexLayout, options: AttentionOptions
) -> torch.Tensor:
    if layout.parts is not None:
        return attend_flash(query, key, value, layout.parts, options)
    return flex_packed(query, key, value, layout.masks[options.window], options)


def _options(query: torch.Tensor, scaling: float | None, kwargs: Mapping[str, Any]) -> AttentionOptions:
    return AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )


def _refuse_hidden_window(module: torch.nn.Module, layout: PackedLayout | CachedLayout | SlicedLayout) -> None:
    """Some models encode a layer's window only in the mask, which packed attention does not use."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "sliding_attention"
    field = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(kind)
    window = getattr(config, field, None) if field else None
    if window is None:
        return
    if isinstance(layout, PackedLayout):
        layout.hidden_windows.add(window)
    if layout.max_len > window:
        raise ModelError(
            f"{type(module).__name__} does not pass its window of {window:,} tokens to attention: "
            f"sequences longer than that cannot be trained; set data.max_seq_tokens to {window}"
        )


def _bucketed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, options: AttentionOptions
) -> torch.Tensor:
    rows = [_ToRows.apply(tensor[0].transpose(0, 1), layout) for tensor in (query, key, value)]  # type: ignore[no-untyped-call]
    outputs = []
    for bucket, padded in zip(layout.buckets, zip(*rows, strict=True), strict=True):
        q, k, v = (tensor.transpose(1, 2) for tensor in padded)
        if bucket.prefix is not None:
            before = (
                rows[1][bucket.prefix][:, : bucket.fork].transpose(1, 2),
                rows[2][bucket.prefix][:, : bucket.fork].transpose(1, 2),
            )
            outputs.append(eager_attention(q, k, v, before, options).transpose(1, 2))
            continue
        longest = q.shape[2]
        is_plain = options.softcap is None and options.sinks is None
        if longest > EAGER_MAX_TOKENS and is_plain:
            windowed = options.window is not None and options.window < longest
            mask = causal_mask(longest, longest, options.window, q.device) if windowed else None
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=options.scaling, enable_gqa=True
            )
        else:
            out = eager_attention(q, k, v, None, options)
        outputs.append(out.transpose(1, 2))
    return _ToPack.apply(layout, *outputs)[None]  # type: ignore[no-untyped-call]


class _ToRows(torch.autograd.Function):
    """[T, ...] of the pack to [R, L, ...] of each bucket.

    Has its own backward because autograd's backward of indexing is a slow scatter-add. Real cells are a permutation of
    the tokens, so the gradient is a gather. Padding cells have no gradient: no token attends to them.
    """

    @staticmethod
    def forward(ctx: Any, pack: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        return tuple(pack[bucket.gather] for bucket in layout.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _pick(ctx.layout, grads), None


class _ToPack(torch.autograd.Function):
    """The inverse of `_ToRows`: real cells only; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, layout: PackedLayout, *padded: torch.Tensor) -> torch.Tensor:
        ctx.layout = layout
        return _pick(layout, padded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = []
        for bucket in ctx.layout.buckets:
            spread = grad[bucket.gather]
            spread.flatten(0, 1)[bucket.padding] = 0.0
            grads.append(spread)
        return None, *grads


def _pick(layout: PackedLayout, padded: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = [rows.flatten(0, 1)[bucket.cells] for rows, bucket in zip(padded, layout.buckets, strict=True)]
    return torch.cat(flat)[layout.order]


def _cached(query: torch.Tensor, layer: LayerCache, cache: KeyValueCache, options: AttentionOptions) -> torch.Tensor:
    """[1, R, H, D] attention of one token of each row, [1, H, R, D], to its prompt and to its own tokens.

    Args:
        query: [1, H, R, D].
        layer: keys and values of this layer, with the token's own appended.
        cache: which rows belong to each prompt, and which prompt tokens are hidden.
        options: of the layer's attention.
    """
    _, heads, rows, width = query.shape
    kv_heads, longest = layer.prompt_keys.shape[1:3]
    folded = query[0].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, width)
    start = 0 if options.window is None else max(0, cache.num_own + 1 - options.window)
    own = slice(start, cache.num_own + 1)

    def of_prompts(tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """[R, H_kv, q, n] times its prompt's [S, H_kv, n, m], for all rows of a prompt at once."""
        in_slots = tensor.view(len(matrix), -1, *tensor.shape[1:]) if cache.slots is None else tensor[cache.slots]
        in_slots = in_slots.transpose(1, 2)
        out = in_slots.flatten(2, 3) @ matrix
        out = out.view(*in_slots.shape[:-1], -1).transpose(1, 2).flatten(0, 1)
        return out if cache.slots is None else out[cache.slot_of_row]

    prompt_scores = of_prompts(folded, layer.prompt_keys.transpose(-1, -2))
    own_scores = folded @ layer.keys[:rows, ..., own]
    scores = torch.cat([prompt_scores, own_scores], -1) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    hidden = cache.hidden(options.window)
    if hidden is not None:
        scores[..., :longest].masked_fill_(hidden, float("-inf"))
    if options.sinks is not None:
        column = options.sinks.to(scores.dtype).view(1, kv_heads, -1, 1).expand(rows, -1, -1, -1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(layer.values.dtype)
    out = of_prompts(weights[..., :longest], layer.prompt_values)
    out += weights[..., longest : longest + own_scores.shape[-1]] @ layer.values[:rows, :, own]
    return out.reshape(1, rows, heads, -1)


def register() -> None:
    """Register `PACKED_ATTENTION` with transformers; idempotent."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
