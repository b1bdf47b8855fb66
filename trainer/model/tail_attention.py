"""Attention of tails: tokens that follow cached keys and values, causal among themselves."""

from __future__ import annotations

from typing import Final

import torch

from trainer.model.eager_attention import AttentionOptions
from trainer.model.kv_cache import LayerCache
from trainer.model.turn_cache import Tails

MAX_CELLS: Final = 1 << 25
"""Scores computed at once; more are computed in parts, which depend on lengths alone."""


def tail_attention(query: torch.Tensor, layer: LayerCache, tails: Tails, options: AttentionOptions) -> torch.Tensor:
    """[1, T, H, D] attention of each tail to its prefix and to itself.

    Args:
        query: [1, H, T, D] of the pack of tails.
        layer: the keys and values of whole prompts, [S, H_kv, P, D], the tails included.
        tails: positions of the pack.
        options: of the layer's attention.
    """
    queries = tails.padded(query[0].transpose(0, 1)).transpose(1, 2)  # [S, H, L, D]
    num, heads, longest, _ = queries.shape
    row_cells = heads * layer.prompt_keys.shape[2]
    query_step = max(1, min(longest, MAX_CELLS // row_cells))
    row_step = max(1, min(num, MAX_CELLS // (row_cells * query_step)))
    out = torch.cat(
        [
            torch.cat(
                [
                    _part(queries, layer, tails, options, slice(row, row + row_step), slice(begin, begin + query_step))
                    for begin in range(0, longest, query_step)
                ],
                2,
            )
            for row in range(0, num, row_step)
        ]
    )
    return tails.packed(out.transpose(1, 2))[None]


def _part(
    queries: torch.Tensor, layer: LayerCache, tails: Tails, options: AttentionOptions, rows: slice, part: slice
) -> torch.Tensor:
    """[s, H, l, D] for some conversations and some queries of each."""
    query, keys, values = queries[rows, :, part], layer.prompt_keys[rows], layer.prompt_values[rows]
    num, heads, length, width = query.shape
    kv_heads, num_keys = keys.shape[1:3]
    scores = query.reshape(num, kv_heads, -1, width) @ keys.transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.unflatten(2, (-1, length))  # [s, H_kv, q, l, P]
    position = tails.begins[rows, None] + torch.arange(part.start, part.start + length, device=query.device)
    distance = position[:, :, None] - torch.arange(num_keys, device=query.device)
    hidden = distance < 0
    if options.window is not None:
        hidden |= distance >= options.window
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    if options.sinks is not None:
        column = options.sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    out = weights[..., :num_keys].flatten(2, 3) @ values
    return out.view(num, heads, length, -1)
