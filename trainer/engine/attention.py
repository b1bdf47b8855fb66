"""Attention of one step over the paged store: rows of one token each, and chunks of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch.nn.functional import scaled_dot_product_attention

from trainer.engine.pages import PAGE, PagePool
from trainer.sampling.fused import FusedLayer

MINUS_INFINITY: Final = float("-inf")


@final
@dataclass(frozen=True)
class Segment:
    """Tokens of one sequence in a step."""

    pages: Sequence[int]
    """Of the sequence, with room for these tokens."""
    first: int
    """Position of the first of them in the sequence."""
    count: int

    @property
    def end(self) -> int:
        """Tokens of the sequence after the step."""
        return self.first + self.count


@final
class StepAttention:
    """Stores keys and values of a step's tokens, and attends to everything before them.

    Rows of one token attend together: their pages are gathered into one list, [S, H_kv, D, PAGE] for S pages in all,
    so that no short row pays for a long one. A chunk of a prompt attends by itself.
    """

    def __init__(self, pool: PagePool, segments: Sequence[Segment]) -> None:
        """Prepare the indices of all layers.

        Args:
            pool: the store.
            segments: in the order of the pack.
        """
        self._pool, self._segments = pool, segments
        places = [
            (segment.pages[position // PAGE], position % PAGE)
            for segment in segments
            for position in range(segment.first, segment.end)
        ]
        self._page, self._offset = torch.tensor(places).unbind(1)
        starts = [0]
        for segment in segments:
            starts.append(starts[-1] + segment.count)
        self._chunks = [(start, each) for start, each in zip(starts, segments, strict=False) if each.count > 1]
        rows = [(start, each) for start, each in zip(starts, segments, strict=False) if each.count == 1]
        self._rows = torch.tensor([start for start, _ in rows])
        self._num_rows = len(rows)
        used = [-(-each.end // PAGE) for _, each in rows]
        self._most = max(used, default=0)
        self._list = torch.tensor([page for (_, each), n in zip(rows, used, strict=True) for page in each.pages[:n]])
        self._row_of = torch.tensor([row for row, n in enumerate(used) for _ in range(n)])
        self._column_of = torch.tensor([column for n in used for column in range(n)])
        self._ends = torch.tensor([each.end for _, each in rows])
        self._masks: dict[int | None, torch.Tensor] = {}

    def __call__(self, layer: FusedLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[1, T, H, D] attention of a layer.

        Args:
            layer: its number, scaling and window.
            query: [1, H, T, D].
            key: [1, H_kv, T, D].
            value: [1, H_kv, T, D].
        """
        keys, values = self._pool.keys[layer.index], self._pool.values[layer.index]
        keys[self._page, :, :, self._offset] = key[0].transpose(0, 1)
        values[self._page, :, self._offset] = value[0].transpose(0, 1)
        if not self._chunks:
            return self._of_rows(query[0].transpose(0, 1), keys, values, layer)[None]
        out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        if self._num_rows:
            out[self._rows] = self._of_rows(query[0].transpose(0, 1)[self._rows], keys, values, layer)
        for start, segment in self._chunks:
            inside = slice(start, start + segment.count)
            before = (keys, values) if segment.first else None
            out[inside] = _of_chunk(query[:, :, inside], key[:, :, inside], value[:, :, inside], before, segment, layer)
        return out[None]

    def _of_rows(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: FusedLayer
    ) -> torch.Tensor:
        """[R, H, D], from queries [R, H, D]; products in float32, which is faster than bf16 for matrices this small."""
        rows, heads, width = query.shape
        kv_heads = keys.shape[1]
        grouped = query.reshape(rows, kv_heads, heads // kv_heads, width).float()
        scores = grouped[self._row_of] @ keys.index_select(0, self._list).float()
        padded = scores.new_full((rows, kv_heads, heads // kv_heads, self._most, PAGE), MINUS_INFINITY)
        padded[self._row_of, :, :, self._column_of] = scores
        flat = padded.flatten(3).mul_(layer.scaling).add_(self._mask(layer.window))
        weights = flat.softmax(-1).view_as(padded)[self._row_of, :, :, self._column_of]
        of_pages = weights @ values.index_select(0, self._list).float()
        out = of_pages.new_zeros(rows, *of_pages.shape[1:]).index_add_(0, self._row_of, of_pages)
        return out.view(rows, heads, width).to(query.dtype)

    def _mask(self, window: int | None) -> torch.Tensor:
        """[R, 1, 1, most * PAGE]: 0 where a row's token attends, minus infinity elsewhere."""
        if window not in self._masks:
            position = torch.arange(self._most * PAGE)
            hidden = position >= self._ends[:, None]
            if window is not None:
                hidden |= position < self._ends[:, None] - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, MINUS_INFINITY)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def _of_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    segment: Segment,
    layer: FusedLayer,
) -> torch.Tensor:
    """[c, H, D] attention of a chunk of c tokens.

    Args:
        query: [1, H, c, D].
        key: [1, H_kv, c, D] of the chunk.
        value: the same.
        before: the store's keys and values, where tokens precede the chunk.
        segment: the chunk.
        layer: scaling and window.
    """
    if before is not None:
        pages = torch.tensor(segment.pages[: -(-segment.end // PAGE)])
        key = before[0][pages].permute(1, 0, 3, 2).flatten(1, 2)[None, :, : segment.end]
        value = before[1][pages].transpose(0, 1).flatten(1, 2)[None, :, : segment.end]
    is_windowed = layer.window is not None and segment.end > layer.window
    mask = None
    if before is not None or is_windowed:
        own = torch.arange(segment.first, segment.end)[:, None]
        other = torch.arange(segment.end - key.shape[2], segment.end)
        mask = other <= own
        if layer.window is not None:
            mask &= other > own - layer.window
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=layer.scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)
