"""Attention over packs of plain sequences as one operator of compiled layers; for attention.py only.

On a GPU its kernels are those of FlashAttention-4. The layers receive where each sequence begins instead of masks.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_choice import kernels_for


def attend_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """[1, T, H, D_v] causal attention within each sequence.

    Args:
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D_v].
        starts: [S + 1] int32, where each sequence begins, and T.
        options: of the layer's attention.
    """
    by_token = (each[0].transpose(0, 1) for each in (query, key, value))
    window, softcap = options.window or 0, options.softcap or 0.0
    output, _ = _operator(*by_token, starts, options.scaling, window, softcap, options.sinks)
    return output[None]


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H, D_v] and [H, T]; a window or soft cap of 0 is none."""
    options = AttentionOptions(scaling, window or None, softcap or None, sinks)
    return kernels_for(query).forward(query, key, value, starts, options)


def _backward(  # noqa: PLR0913 - an operator takes tensors and numbers only
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    starts: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of query, key and value, and of the sinks if there are any."""
    options = AttentionOptions(scaling, window or None, softcap or None, sinks)
    found = kernels_for(query).gradients(grad, query, key, value, output, log_sum_exp, starts, options)
    return [each for each in found if each is not None]


_operator = torch.library.custom_op("trainer::flash_attention", _forward, mutates_args=())
_gradients = torch.library.custom_op("trainer::flash_attention_gradients", _backward, mutates_args=())


@_operator.register_fake
def _fake(query: torch.Tensor, _key: Any, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads = query.shape[:2]
    sums = query.new_empty(heads, tokens, dtype=torch.float32)
    return query.new_empty(tokens, heads, value.shape[2]), sums


@_gradients.register_fake
def _fake_gradients(_grad: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
    sinks = rest[-1]
    given = (query, key, value, *([] if sinks is None else [sinks]))
    return [each.new_empty(each.shape) for each in given]


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, starts, *ctx.numbers, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, starts, sinks)


def _operator_backward(ctx: Any, grad: torch.Tensor, _sums: Any) -> tuple[Any, ...]:
    *before, sinks = ctx.saved_tensors
    found = _gradients(grad, *before, *ctx.numbers, sinks)
    of_sinks = found[3] if sinks is not None else None
    return found[0], found[1], found[2], None, None, None, None, of_sinks


_operator.register_autograd(_operator_backward, setup_context=_save_for_gradients)
