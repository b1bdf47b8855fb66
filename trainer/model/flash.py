"""FlashAttention-4 over sequences end to end, without padding; for flash_choice.py only.

The kernels are those of the package `flash-attn-4` (the extra `flash`), written in CuTe DSL and compiled when they are
first used: for sm_90 and sm_100, with no compiler or toolkit on the machine.
"""

from __future__ import annotations

import torch

from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_trees import Found, Given, Gradients, Spans


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, options: AttentionOptions
) -> Found:
    """[Q, H, D_v] attention within each sequence, and [H, Q] float32 log-sum-exp of the scores.

    Args:
        query: [Q, H, D].
        key: [K, H_kv, D].
        value: [K, H_kv, D_v].
        spans: which queries attend to which keys.
        options: of the layer's attention.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    left, right = _window(options)
    output, sums, *_ = _flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=spans.queries,
        cu_seqlens_k=spans.keys,
        softmax_scale=options.scaling,
        causal=spans.is_causal,
        softcap=options.softcap,
        window_size_left=left,
        window_size_right=right,
        learnable_sink=options.sinks,
        return_lse=True,
    )
    return output, sums


def gradients(grad: torch.Tensor, given: Given, found: Found, spans: Spans, options: AttentionOptions) -> Gradients:
    """Gradients of query, key, value and, if there are any, of the sinks.

    Args:
        grad: of the output, [Q, H, D_v].
        given: query, key and value, as in `forward`.
        found: what `forward` returned.
        spans: as in `forward`.
        options: as in `forward`.
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    (query, key, value), (output, sums) = given, found
    left, right = _window(options)
    gradients = _flash_attn_bwd(
        query,
        key,
        value,
        output,
        grad.contiguous(),
        sums,
        options.scaling,
        spans.is_causal,
        options.softcap or 0.0,
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=spans.queries,
        cu_seqlens_k=spans.keys,
        learnable_sink=options.sinks,
        dq=query.new_empty(query.shape),  # by default they have the strides of what was given
        dk=key.new_empty(key.shape),
        dv=value.new_empty(value.shape),
    )
    return gradients[0], gradients[1], gradients[2], gradients[3] if options.sinks is not None else None


def _window(options: AttentionOptions) -> tuple[int | None, int | None]:
    """How many tokens before and behind its own a query sees."""
    return (None, None) if options.window is None else (options.window - 1, 0)
