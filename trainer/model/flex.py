"""FlexAttention over packs, for GPUs: block masks of packs, and what a compiled layer receives of them.

Sinks: FlexAttention returns the log-sum-exp of the scores, and a sink of logit s adds exp(s) to the denominator, so the
output is the one without sink times sigmoid(lse - s).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, final

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_choice import AttentionKind
from trainer.model.flash_trees import Parts
from trainer.model.layout import PackedLayout, SlicedLayout

MASK_BLOCK: Final = 128
"""Block size of FlexAttention's mask."""


@final
@dataclass(frozen=True)
class FlexLayout:
    """What a compiled layer receives of a pack: tensors only, so that no length is compiled into it."""

    masks: dict[int | None, BlockMask]
    """By window; empty where `parts` are used instead."""
    parts: Parts | None = None
    """Of a pack that FlashAttention-4 computes."""

    @classmethod
    def of(
        cls, layout: PackedLayout, kinds: Collection[AttentionKind], padding: int, *, uses_flash: bool = False
    ) -> FlexLayout:
        """What attention reads of a pack with `padding` more tokens behind it, which attend to themselves only.

        Args:
            layout: of the pack.
            kinds: of attention that the layers have.
            padding: tokens behind the pack.
            uses_flash: whether FlashAttention-4 computes packs of which it can: without branches that a layer's window
                or sinks would reach, and without branches of a part of a prefix.
        """
        parts = layout.parts(padding) if uses_flash and _is_for_flash(layout, kinds) else None
        if parts is not None:
            return cls({}, parts)
        return cls({window: block_mask_of(layout, window, padding) for window in {kind.window for kind in kinds}})


def _is_for_flash(layout: PackedLayout, kinds: Iterable[AttentionKind]) -> bool:
    reached = layout.max_len
    return layout.is_plain or not any(kind.has_sinks or (kind.window or reached) < reached for kind in kinds)


def attend_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, options: AttentionOptions
) -> torch.Tensor:
    """[1, T, H, D] attention within the sequences of a pack."""
    return flex_packed(query, key, value, block_mask_of(layout, options.window), options)


def flex_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, options: AttentionOptions
) -> torch.Tensor:
    """[1, T, H, D] attention of [1, H, T, D] queries to [1, H_kv, T, D] keys, compiled on a GPU."""
    softcap = options.softcap or 1.0

    def capped(
        score: torch.Tensor, _b: torch.Tensor, _h: torch.Tensor, _q: torch.Tensor, _k: torch.Tensor
    ) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    kernel: Callable[..., Any] = flex_attention
    if not torch.compiler.is_compiling():
        kernel = _flex_kernel(query.device.type)
    out = kernel(
        query,
        key,
        value,
        score_mod=capped if options.softcap is not None else None,
        block_mask=mask,
        scale=options.scaling,
        enable_gqa=True,
        return_aux=None if options.sinks is None else AuxRequest(lse=True),
    )
    if options.sinks is not None:
        out, aux = out
        out = out * torch.sigmoid(aux.lse - options.sinks.to(aux.lse.dtype)[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2)


@cache
def _flex_kernel(device: str, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """FlexAttention, compiled on GPU: uncompiled, it writes the whole score matrix to memory."""
    if device != "cuda":
        return flex_attention
    prepare_compiler()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def prepare_compiler() -> None:
    """Settings of torch.compile that our kernels need."""
    # Otherwise scale and soft cap become inputs, which the kernel cannot read.
    torch._dynamo.config.specialize_float = True
    # Windows, short packs, with and without gradient: more variants than the default.
    torch._dynamo.config.recompile_limit = 64
    # A layer's adapters hand on products within its forward (lora_group.py); a recomputation must not do that again.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def block_mask_of(layout: PackedLayout, window: int | None, padding: int = 0) -> BlockMask:
    """The block mask of a pack; computed once for all layers with this window.

    Computed from the first and last token of each block: `create_block_mask` would evaluate all T x T cells.

    Args:
        layout: of the pack.
        window: of the layer, or None.
        padding: tokens behind the pack that attend to themselves only.
    """
    if (window, padding) not in layout.block_masks:
        layout.block_masks[window, padding] = _make_mask(layout, window, padding, None)
    return layout.block_masks[window, padding]


def slice_mask_of(layout: SlicedLayout, window: int | None) -> BlockMask:
    """The rows of a pack's block mask that are queries of this rank; computed once for all layers with this window.

    Args:
        layout: of a slice whose chunks have whole blocks.
        window: of the layer, or None.
    """
    if window not in layout.block_masks:
        layout.block_masks[window] = _make_mask(layout.whole, window, 0, layout.rows)
    return layout.block_masks[window]


def _make_mask(layout: PackedLayout, window: int | None, padding: int, rows: torch.Tensor | None) -> BlockMask:
    """The block mask of a pack.

    Args:
        layout: of the pack.
        window: of the layer, or None.
        padding: tokens behind the pack.
        rows: [t] positions in the pack of the queries, in whole blocks; None: all are queries.
    """
    # Cloned: a view's offset would be compiled into the kernel.
    tree, branch, fork, position = (row.clone() for row in layout.coordinates(padding))
    has_forks = bool(layout.forks)

    def is_visible(_b: torch.Tensor, _h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        is_near = position[q] - position[k] < window if window is not None else q >= k
        is_behind = (branch[k] == 0) & (position[k] < fork[q]) if has_forks else branch[k] == 0
        is_behind = is_behind | (branch[q] == branch[k])
        return (tree[q] == tree[k]) & is_behind & (q >= k) & is_near

    def is_visible_of_slice(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        assert rows is not None
        return is_visible(b, h, rows[q], k)

    some, full = _visible_blocks(tree, branch, window, has_forks=has_forks)
    if rows is not None:
        blocks = rows[::MASK_BLOCK] // MASK_BLOCK
        some, full = some[blocks], full[blocks]
    made: BlockMask = BlockMask.from_kv_blocks(
        *_by_row(some & ~full),
        *_by_row(full),
        MASK_BLOCK,
        is_visible if rows is None else is_visible_of_slice,
        (len(tree) if rows is None else len(rows), len(tree)),
    )
    return made


def _visible_blocks(
    tree: torch.Tensor, branch: torch.Tensor, window: int | None, *, has_forks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, B] bool of query and key blocks: whether any query attends to any key, and whether all attend to all.

    Prefixes and branches are numbered in the order of the pack. A key before the query block is visible if it belongs
    to the same part (prefix or branch) as the first query, or to that query's prefix. With a window, or branches that
    continue a part of their prefix, blocks of prefixes are always treated as partly visible to branches.
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
    sees_trunk = (trunk != begin) | is_near
    if has_forks:  # a branch in the query block may continue a part of the prefix that is far from its end
        sees_trunk |= begin != end
    some |= is_past & (key_begin <= trunk) & (trunk <= key_end) & sees_trunk
    is_whole = end == key_begin
    if window is None:
        if not has_forks:
            is_whole |= (key_begin == trunk) & (key_end == trunk) & (tree[first] == tree[last])[:, None]
    else:
        is_whole &= last[:, None] - first[None, :] < window
    full = is_past & is_whole
    full &= (last - first + 1 == MASK_BLOCK)[:, None]  # the last query block, if incomplete, is never full
    some |= torch.eye(len(first), dtype=torch.bool, device=tree.device)
    return some, full


def _by_row(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, 1, B] number of marked blocks in each row, and [1, 1, B, B] block indices, marked ones first."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()
