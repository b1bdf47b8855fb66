"""Attention over packs as one operator of compiled layers, without masks; for attention.py only.

On a GPU its kernels are those of FlashAttention-4. The layers receive where the parts of a pack begin instead of masks.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.model import flash_trees
from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_choice import kernels_for
from trainer.model.flash_trees import Parts


def attend_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts, options: AttentionOptions
) -> torch.Tensor:
    """[1, T, H, D_v] causal attention within each sequence.

    Args:
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D_v].
        parts: of the pack; see flash_trees.py for what branches need.
        options: of the layer's attention.
    """
    by_token = (each[0].transpose(0, 1) for each in (query, key, value))
    numbers = [options.scaling, float(options.window or 0), options.softcap or 0.0]
    tensors = [each for each in parts if each is not None]
    output, _ = _operator(*by_token, tensors, numbers, options.sinks)
    return output[None]


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: list[torch.Tensor],
    numbers: list[float],
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H, D_v] and [H, T]. The numbers: scaling, window and soft cap, of which 0 is none."""
    return flash_trees.forward(kernels_for(query), query, key, value, Parts(*parts), _options(numbers, sinks))


def _backward(  # noqa: PLR0913 - an operator takes tensors and lists only
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    parts: list[torch.Tensor],
    numbers: list[float],
    sinks: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of query, key and value, and of the sinks if there are any."""
    options = _options(numbers, sinks)
    given, kept, kernels = (query, key, value), (output, sums), kernels_for(query)
    found = flash_trees.gradients(kernels, grad, given, kept, Parts(*parts), options)
    return [each for each in found if each is not None]


def _options(numbers: list[float], sinks: torch.Tensor | None) -> AttentionOptions:
    scaling, window, softcap = numbers
    return AttentionOptions(scaling, int(window) or None, softcap or None, sinks)


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
    query, key, value, parts, ctx.numbers, sinks = inputs
    ctx.num_parts = len(parts)
    ctx.save_for_backward(query, key, value, *output, sinks, *parts)


def _operator_backward(ctx: Any, grad: torch.Tensor, _sums: Any) -> tuple[Any, ...]:
    query, key, value, output, sums, sinks, *parts = ctx.saved_tensors
    found = _gradients(grad, query, key, value, output, sums, parts, ctx.numbers, sinks)
    of_sinks = found[3] if sinks is not None else None
    return found[0], found[1], found[2], [None] * ctx.num_parts, None, of_sinks


_operator.register_autograd(_operator_backward, setup_context=_save_for_gradients)
