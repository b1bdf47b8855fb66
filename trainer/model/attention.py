"""Attention over packed sequences: the only module that knows kernels and masks.

A pack is a flat row of T tokens holding S sequences end to end, or behind one copy of what they begin with (layout.py).
A token attends to itself and to what came before it in its own sequence, nothing else. The model is told to use
`PACKED_ATTENTION`, which transformers calls in every layer; the layout of the pack travels as the keyword `packed`. No
mask is registered for the name, so transformers builds none.

CPU: sequences are gathered into right-padded rows of like length, which a causal kernel handles without a mask. Up to
`EXPLICIT_MAX_TOKENS` the formula written out (explicit.py) beats the fused kernel (docs/log.md), above it SDPA runs.
GPU: FlexAttention with a document block mask; a dense mask is never built there.

Sampling hands a `CachedLayout` instead: first with the pack of the prompts, whose keys and values are kept, then for
one token of each row at a time. Rows of one prompt read its keys and values together, as one matrix product, and their
own beside it; the two parts meet in one softmax, so nothing is approximate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.errors import ModelError
from trainer.model.eager_attention import AttentionForm, causal_mask, explicit_attention
from trainer.model.kv_cache import KeyValueCache, LayerCache
from trainer.model.layout import CachedLayout, PackedLayout

PACKED_ATTENTION: Final = "tunesmith_packed"
EXPLICIT_MAX_TOKENS: Final = 384
MASK_BLOCK: Final = 128
"""Queries and keys of a block of FlexAttention's mask."""


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
    """What transformers calls in every layer.

    Args:
        module: the layer's attention module.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D].
        attention_mask: None, or the model builds masks of its own and is refused.
        scaling: factor of the scores; 1 / sqrt(D) when None.
        dropout: attention dropout, which packed attention does not have.
        **kwargs: `packed`, and the layer's `sliding_window`, `softcap`, `s_aux` where it has them.

    Returns:
        [1, T, H, D] and no weights.
    """
    layout = kwargs.get("packed")
    if not isinstance(layout, PackedLayout | CachedLayout):
        raise ModelError(f"{type(module).__name__} does not hand the pack's layout to attention: model not supported")
    if attention_mask is not None or query.shape[0] != 1:
        raise ModelError(f"{type(module).__name__} builds a mask of its own: packed training would leak")
    if dropout:
        raise ModelError("attention dropout is not supported; set attention_dropout to 0 in the model's config.json")
    window = kwargs.get("sliding_window")
    if window is None:
        _refuse_unsaid_window(module, layout.max_len)
    form = AttentionForm(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    if isinstance(layout, CachedLayout):
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layout.prompts is None:
            return _cached(query, layout.cache.append(layer, key, value), layout.cache, form), None
        layout.cache.keep_prompts(layer, key, value)
        layout = layout.prompts
    if query.device.type == "cpu":
        return _bucketed(query, key, value, layout, form), None
    return _flex(query, key, value, layout, form), None


def _refuse_unsaid_window(module: torch.nn.Module, longest: int) -> None:
    """Some models put a layer's window only into the mask, which packed attention never sees."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "sliding_attention"
    field = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(kind)
    window = getattr(config, field, None) if field else None
    if window is not None and longest > window:
        raise ModelError(
            f"{type(module).__name__} does not hand its window of {window:,} tokens to attention: "
            f"sequences longer than that cannot be trained; set data.max_seq_tokens to {window}"
        )


def _bucketed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, form: AttentionForm
) -> torch.Tensor:
    rows = [_ToRows.apply(tensor[0].transpose(0, 1), layout) for tensor in (query, key, value)]  # type: ignore[no-untyped-call]
    outputs = []
    for bucket, padded in zip(layout.buckets, zip(*rows, strict=True), strict=True):
        q, k, v = (tensor.transpose(1, 2) for tensor in padded)
        if bucket.prefix is not None:
            before = rows[1][bucket.prefix].transpose(1, 2), rows[2][bucket.prefix].transpose(1, 2)
            outputs.append(explicit_attention(q, k, v, before, form).transpose(1, 2))
            continue
        longest = q.shape[2]
        is_plain = form.softcap is None and form.sinks is None
        if longest > EXPLICIT_MAX_TOKENS and is_plain:
            windowed = form.window is not None and form.window < longest
            mask = causal_mask(longest, longest, form.window, q.device) if windowed else None
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=form.scaling, enable_gqa=True
            )
        else:
            out = explicit_attention(q, k, v, None, form)
        outputs.append(out.transpose(1, 2))
    return _ToPack.apply(layout, *outputs)[None]  # type: ignore[no-untyped-call]


class _ToRows(torch.autograd.Function):
    """[T, ...] of the pack to [R, L, ...] of each bucket. Written by hand because the backward of indexing adds up.

    Real cells are a permutation of the tokens, so the gradient is a gather too. Padding cells carry no gradient: what
    comes after a sequence is seen by nobody.
    """

    @staticmethod
    def forward(ctx: Any, pack: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        return tuple(pack[bucket.gather] for bucket in layout.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _pick(ctx.layout, grads), None


class _ToPack(torch.autograd.Function):
    """The way back: real cells only; their padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, layout: PackedLayout, *padded: torch.Tensor) -> torch.Tensor:
        ctx.layout = layout
        return _pick(layout, padded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = []
        for bucket in ctx.layout.buckets:
            spread = grad[bucket.gather]
            spread.flatten(0, 1)[bucket.padding] = 0.0
            found.append(spread)
        return None, *found


def _pick(layout: PackedLayout, padded: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = [rows.flatten(0, 1)[bucket.cells] for rows, bucket in zip(padded, layout.buckets, strict=True)]
    return torch.cat(flat)[layout.order]


def _cached(query: torch.Tensor, layer: LayerCache, cache: KeyValueCache, form: AttentionForm) -> torch.Tensor:
    """[1, R, H, D] attention of one token of each row, [1, H, R, D], to its prompt and to what it has drawn."""
    _, heads, rows, width = query.shape
    kv_heads, longest = layer.prompt_keys.shape[1:3]
    folded = query[0].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, width)
    start = 0 if form.window is None else max(0, cache.num_own + 1 - form.window)
    own = slice(start, cache.num_own + 1)

    def of_prompts(tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """[R, H_kv, q, n] times its prompt's [S, H_kv, n, m], for all rows of a prompt at once."""
        in_slots = tensor.view(len(matrix), -1, *tensor.shape[1:]) if cache.slots is None else tensor[cache.slots]
        in_slots = in_slots.transpose(1, 2)
        out = in_slots.flatten(2, 3) @ matrix
        out = out.view(*in_slots.shape[:-1], -1).transpose(1, 2).flatten(0, 1)
        return out if cache.slots is None else out[cache.places]

    prompt_scores = of_prompts(folded, layer.prompt_keys.transpose(-1, -2))
    own_scores = folded @ layer.keys[:rows, ..., own]
    scores = torch.cat([prompt_scores, own_scores], -1) * form.scaling
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    hidden = cache.hidden(form.window)
    if hidden is not None:
        scores[..., :longest].masked_fill_(hidden, float("-inf"))
    if form.sinks is not None:
        column = form.sinks.to(scores.dtype).view(1, kv_heads, -1, 1).expand(rows, -1, -1, -1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(layer.values.dtype)
    out = of_prompts(weights[..., :longest], layer.prompt_values)
    out += weights[..., longest : longest + own_scores.shape[-1]] @ layer.values[:rows, :, own]
    return out.reshape(1, rows, heads, -1)


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, form: AttentionForm
) -> torch.Tensor:
    if form.sinks is not None:
        raise ModelError(
            "attention sinks are not supported on GPU yet; train this model on the CPU shape or not at all"
        )
    softcap = form.softcap or 1.0

    def capped(score: torch.Tensor, _b: Any, _h: Any, _q: Any, _k: Any) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    out = _flex_kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=capped if form.softcap is not None else None,
        block_mask=_block_mask(layout, form.window),
        scale=form.scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


@cache
def _flex_kernel(device: str, backend: Any = "inductor") -> Any:
    """Compiled where it matters: uncompiled FlexAttention writes the whole score matrix."""
    if device != "cuda":
        return flex_attention
    torch._dynamo.config.specialize_float = True  # or scale and soft cap become inputs, which the kernel cannot read
    torch._dynamo.config.recompile_limit = 64  # windows, short packs, with and without gradient; then it gives up
    return torch.compile(flex_attention, dynamic=True, backend=backend)


def _block_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """Which blocks of a pack see each other; made once for all layers with this window.

    Computed block by block from the ends of each: `create_block_mask` writes all T x T cells to look at them.
    """
    if window not in layout.block_masks:
        tree, branch, position = (row.clone() for row in layout.coordinates())  # a view's offset would be compiled in

        def is_visible(_b: Any, _h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            is_near = position[q] - position[k] < window if window is not None else q >= k
            is_behind = (branch[k] == 0) | (branch[q] == branch[k])
            return (tree[q] == tree[k]) & is_behind & (q >= k) & is_near

        some, every = _visible_blocks(tree, branch, window)
        made: BlockMask = BlockMask.from_kv_blocks(
            *_by_row(some & ~every), *_by_row(every), MASK_BLOCK, is_visible, (len(tree), len(tree))
        )
        layout.block_masks[window] = made
    return layout.block_masks[window]


def _visible_blocks(tree: torch.Tensor, branch: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, B] of query and key blocks: whether some query sees some key, and whether every one sees every one.

    Prefixes and branches stand in order, so their numbers only grow. A key before the query block is seen where it is
    of the part that the first query is in, or of that query's prefix. Branches under a window count as seen in part.
    """
    total = len(tree)
    part = torch.stack([tree, branch]).diff(dim=1, prepend=tree.new_full((2, 1), -1)).ne(0).any(0).cumsum(0)
    prefix = part[torch.searchsorted(tree, tree)]
    first = torch.arange(0, total, MASK_BLOCK, device=tree.device)
    last = (first + MASK_BLOCK - 1).clamp(max=total - 1)
    is_past = first[:, None] > last[None, :]
    begin, end, trunk = part[first][:, None], part[last][:, None], prefix[first][:, None]
    key_begin, key_end = part[first][None, :], part[last][None, :]
    is_near = is_past if window is None else first[:, None] - last[None, :] < window
    some = is_past & (begin == key_end) & is_near
    some |= is_past & (key_begin <= trunk) & (trunk <= key_end) & ((trunk != begin) | is_near)
    is_whole = end == key_begin
    if window is None:
        is_whole |= (key_begin == trunk) & (key_end == trunk) & (tree[first] == tree[last])[:, None]
    else:
        is_whole &= last[:, None] - first[None, :] < window
    every = is_past & is_whole
    every &= (last - first + 1 == MASK_BLOCK)[:, None]  # a query block that is cut off is never full
    some |= torch.eye(len(first), dtype=torch.bool, device=tree.device)
    return some, every


def _by_row(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, 1, B] number of blocks in each row, and [1, 1, B, B] their indices first."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()


def register() -> None:
    """Make `PACKED_ATTENTION` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
