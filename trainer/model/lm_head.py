"""The LM head in tiles: logprobs of targets without [N, V] logits in memory.

    logprob_i = z_i[y_i] - logsumexp(z_i),  z_i = softcap(W h_i * scale) / temperature
    d logprob_i / d h_i = (onehot(y_i) - softmax(z_i)) W        (times scale, softcap's slope, 1 / temperature)

The derivative with respect to h_i does not depend on the loss. With a frozen head, the forward pass computes it while
the tile's logits are in memory, and the backward pass is one multiplication: two matrix products in all, where
recomputation takes three. A trained head recomputes each tile, because the gradient of its weights needs the gradient
of logprob_i. Products run in the weights' dtype, statistics in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, final

import torch
from torch.autograd.function import once_differentiable

from trainer.model.flex import prepare_compiler

TILE_CELLS: Final = 256 * 49_152
"""Logits in a tile on a CPU: enough rows for an efficient product."""
GPU_TILE_ROWS: Final = 1024
"""Rows of a tile on a GPU. The head's weight is read once for each tile, and a product of n rows makes about n FLOP for
each byte of it; H100, A100 and B200 need 300, 155 and 280."""
CPU_BLOCK_ROWS: Final = 32
"""On a CPU, statistics are computed for this many rows at a time, which fit into its cache (docs/log.md)."""


@final
@dataclass(frozen=True)
class LogitTransform:
    """Scale, soft cap and temperature between the LM head's product and the softmax."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def tile_rows(vocab: int, device: str = "cpu") -> int:
    """Rows of a tile, a power of two.

    Args:
        vocab: V.
        device: its type.
    """
    if device != "cpu":
        return GPU_TILE_ROWS
    return max(16, (1 << (TILE_CELLS // vocab).bit_length()) >> 1)


def tiled_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitTransform,
    *,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of targets, and the entropy of each distribution.

    Args:
        hidden: [N, H].
        weight: [V, H] of the head.
        bias: [V] or None.
        targets: [N] long.
        transform: scale, soft cap, temperature.
        with_entropy: whether to compute the entropy; zeros otherwise.

    Returns:
        [N] float32 logprobs with gradient, [N] float32 entropy without.
    """
    logprobs, entropy = _TiledLogprobs.apply(hidden, weight, bias, targets, transform, with_entropy)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def transformed_log_softmax(
    logits: torch.Tensor, transform: LogitTransform
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[n, V] float32 log-softmax of raw logits, and the derivative of the soft cap."""
    logits = logits.float()
    slope = None
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.softcap is not None:
        capped = torch.tanh(logits / transform.softcap)
        slope = 1 - capped.square()
        logits = capped * transform.softcap
    if transform.temperature != 1.0:
        logits = logits / transform.temperature
    return torch.log_softmax(logits, -1), slope


def _residual(
    log_softmax: torch.Tensor, targets: torch.Tensor, slope: torch.Tensor | None, transform: LogitTransform
) -> torch.Tensor:
    """[n, V] d logprob / d (W h): (onehot - softmax) * d z / d (W h); overwrites its first argument."""
    probabilities = log_softmax.exp_()
    probabilities.scatter_add_(1, targets[:, None], probabilities.new_full((len(targets), 1), -1.0))
    if slope is not None:
        probabilities.mul_(slope)
    factor = -transform.scale / transform.temperature
    return probabilities.mul_(factor) if factor != -1.0 else probabilities.neg_()


Statistics = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""[n] logprobs, [n] entropy and [n, V] residual of a tile; None where not asked for."""


def _statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    with_residual: bool,
    factor: torch.Tensor | None = None,
) -> Statistics:
    """Statistics of the raw logits [n, V] of a tile, which may be overwritten.

    Args:
        logits: of the tile.
        targets: [n].
        transform: scale, soft cap, temperature.
        with_entropy: whether to compute the entropy.
        with_residual: whether to compute d logprob / d logits, in the logits' dtype.
        factor: [n], multiplied into the residual; None is 1.
    """
    compute = _blocked_statistics if logits.device.type == "cpu" else _compiled_statistics()
    return compute(logits, targets, transform, with_entropy, with_residual, factor)


def _blocked_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    with_residual: bool,
    factor: torch.Tensor | None,
) -> Statistics:
    """`_statistics` in blocks that fit into a CPU's cache; the residual overwrites the logits."""
    logprobs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    for rows in _slices(len(logits), CPU_BLOCK_ROWS):
        log_softmax, slope = transformed_log_softmax(logits[rows], transform)
        logprobs[rows] = log_softmax.gather(1, targets[rows, None]).squeeze(1)
        if entropy is not None:
            entropy[rows] = -(log_softmax.exp() * log_softmax).sum(-1)
        if with_residual:  # the logits are not needed any more: reuse their memory
            residual = _residual(log_softmax, targets[rows], slope, transform)
            logits[rows] = residual if factor is None else residual.mul_(factor[rows, None])
    return logprobs, entropy, logits if with_residual else None


def fused_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    with_residual: bool,
    factor: torch.Tensor | None,
) -> Statistics:
    """`_statistics` as the compiler of a GPU takes it: two or three passes over the logits in all."""
    scaled, slope = logits.float() * transform.scale, None
    if transform.softcap is not None:
        capped = torch.tanh(scaled / transform.softcap)
        scaled, slope = capped * transform.softcap, 1 - capped.square()
    scaled = scaled / transform.temperature
    total = torch.logsumexp(scaled, -1, keepdim=True)
    logprobs = scaled.gather(1, targets[:, None]) - total
    probabilities = torch.exp(scaled - total)
    entropy = total.squeeze(1) - (probabilities * scaled).sum(-1) if with_entropy else None
    residual = None
    if with_residual:
        is_target = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
        residual = (is_target.float() - probabilities) * (transform.scale / transform.temperature)
        residual = residual if slope is None else residual * slope
        residual = (residual if factor is None else residual * factor[:, None]).to(logits.dtype)
    return logprobs.squeeze(1), entropy, residual


@cache
def _compiled_statistics() -> Callable[..., Statistics]:
    prepare_compiler()
    return torch.compile(fused_statistics, dynamic=True, fullgraph=True)


def _slices(total: int, rows: int) -> Iterator[slice]:
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        is_head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        keep = hidden.requires_grad and not is_head_trained
        derivative = torch.empty_like(hidden) if keep else None
        for tile in _slices(len(targets), tile_rows(weight.shape[0], weight.device.type)):
            logits = torch.nn.functional.linear(hidden[tile], weight, bias)
            logprobs[tile], measured, residual = _statistics(logits, targets[tile], transform, with_entropy, keep)
            if measured is not None:
                entropy[tile] = measured
            if derivative is not None and residual is not None:
                derivative[tile] = residual @ weight
        ctx.transform, ctx.is_head_trained = transform, is_head_trained
        if is_head_trained:
            ctx.save_for_backward(hidden, weight, bias, targets)
        elif derivative is not None:
            ctx.save_for_backward(derivative)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _entropy: torch.Tensor) -> tuple[Any, ...]:
        if not ctx.is_head_trained:
            (derivative,) = ctx.saved_tensors
            return (derivative * grad[:, None]).to(derivative.dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        for tile in _slices(len(targets), tile_rows(weight.shape[0], weight.device.type)):
            logits = torch.nn.functional.linear(hidden[tile], weight, bias)
            _, _, residual = _statistics(logits, targets[tile], ctx.transform, False, True, grad[tile])
            assert residual is not None
            if grad_bias is not None:
                grad_bias += residual.sum(0, dtype=torch.float32)
            grad_hidden[tile] = residual @ weight
            grad_weight += residual.T @ hidden[tile]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
        )
