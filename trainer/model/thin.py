"""Launches the kernels of thin_kernels.py: products of an adapter's rank that read their wide side once.

Results depend on shapes and values only: partial sums are added in a fixed order, whatever the device does first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from trainer.planning.thin_cut import COLUMNS, GATED_ROWS, ROWS, Cut

SUMMED_ROWS: Final = 64
"""Rows that a program of the second kernel sums."""


def padded_rank(rank: int) -> int:
    """Columns that a kernel computes for a rank: a power of two, at least 16.

    >>> padded_rank(8), padded_rank(24)
    (16, 32)
    """
    return max(16, 1 << (rank - 1).bit_length())


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel of thin_kernels.py.

    Args:
        name: of the kernel.
        grid: number of programs on each axis.
        *arguments: of the kernel.
        **options: its compile-time arguments, `num_warps` and `num_stages`.
    """
    from trainer.model import swiglu_kernels, thin_kernels

    kernel = getattr(thin_kernels, name, None) or getattr(swiglu_kernels, name)
    kernel[grid](*arguments, **options)


def _assert_contiguous(*tensors: torch.Tensor) -> None:
    """Adapters' weights, and results of products, are."""
    assert all(each.is_contiguous() for each in tensors)


def thin_gradients(
    grad: torch.Tensor, inner: torch.Tensor, ups: Sequence[torch.Tensor], scalings: Sequence[float]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`scaling_i * grad_i B_i`, [T, layers * r] in the layout of `inner`, and `scaling_i * grad_i^T (A_i x)` of each.

    Args:
        grad: [T, sum of out_i] of up to three layers.
        inner: A x, [T, layers * r].
        ups: B_i, [out_i, r], of one rank.
        scalings: of each layer.
    """
    num_rows, width, rank = len(grad), grad.shape[1], ups[0].shape[1]
    _assert_contiguous(inner, *ups)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    cut = Cut.of(num_rows, [len(up) for up in ups], ROWS)
    num_parts = cut.parts[-1]
    meta = {"RANK": rank, "PADDED": padded_rank(rank)}
    inner_parts = grad.new_empty((num_parts, num_rows, rank), dtype=torch.float32)
    up_parts = grad.new_empty((cut.num_strips, width, rank), dtype=torch.float32)
    up = ups[0] if len(ups) == 1 else torch.cat(tuple(ups))
    launch(
        "gradients", (cut.num_strips, num_parts), grad, up, inner, inner_parts, up_parts, num_rows, width,
        grad.stride(0), inner.stride(0), *cut.of_first_two(), cut.columns_per_part,
        **meta, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, num_stages=3,
    )  # fmt: skip
    grad_inner, grad_ups = torch.empty_like(inner), [torch.empty_like(each) for each in ups]
    blocks = -(-num_rows // SUMMED_ROWS), -(-max(len(each) for each in ups) // SUMMED_ROWS)
    outs, factors = (*grad_ups, grad_ups[0], grad_ups[0])[:3], (*scalings, 0.0, 0.0)[:3]
    launch(
        "sum_gradients", (sum(blocks), len(ups)), inner_parts, up_parts, grad_inner, *outs, num_rows, width,
        grad_inner.stride(0), *cut.of_first_two(), num_parts, cut.num_strips, blocks[0], *map(float, factors),
        **meta, ROWS=SUMMED_ROWS, num_warps=4,
    )  # fmt: skip
    return grad_inner, grad_ups


def swiglu(
    both: torch.Tensor,
    inner: torch.Tensor,
    ups: tuple[torch.Tensor, torch.Tensor],
    down: torch.Tensor,
    scalings: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h = silu(gate) * up, [T, width], and A_down h, [T, r].

    Args:
        both: base products of gate and up side by side, [T, 2 * width].
        inner: A x of gate and up, [T, 2 * r].
        ups: B of gate and of up, [width, r].
        down: A_down, [r, width].
        scalings: of gate and up.
    """
    num_rows, (width, rank) = len(both), ups[0].shape
    _assert_contiguous(both, inner, *ups, down)
    cut = Cut.of(num_rows, [width], GATED_ROWS)
    meta = {"RANK": rank, "PADDED": padded_rank(rank)}
    hidden, down_inner = both.new_empty(num_rows, width), both.new_empty(num_rows, rank)
    parts = both.new_empty((cut.parts[-1], num_rows, rank), dtype=torch.float32)
    launch(
        "swiglu", (cut.num_strips, cut.parts[-1]), both, inner, *ups, down, hidden, parts, num_rows, width,
        inner.stride(0), cut.columns_per_part, *map(float, scalings),
        **meta, ROWS=GATED_ROWS, COLUMNS=COLUMNS, num_warps=8, num_stages=2,
    )  # fmt: skip
    blocks = -(-num_rows // SUMMED_ROWS)
    launch("sum_swiglu", (blocks,), parts, down_inner, num_rows, cut.parts[-1], **meta, ROWS=SUMMED_ROWS, num_warps=4)
    return hidden, down_inner


def swiglu_gradients(
    grad: torch.Tensor,
    both: torch.Tensor,
    inner: torch.Tensor,
    down_inner: torch.Tensor,
    ups: tuple[torch.Tensor, torch.Tensor],
    down: torch.Tensor,
    scalings: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, [T, 2 * width], of A x, [T, 2 * r], of both B, and of A_down.

    Args:
        grad: of h without the adapter's share, [T, width].
        both: as in `swiglu`.
        inner: as in `swiglu`.
        down_inner: gradient of A_down h, [T, r].
        ups: as in `swiglu`.
        down: as in `swiglu`.
        scalings: of gate and up.
    """
    num_rows, (width, rank) = len(both), ups[0].shape
    _assert_contiguous(grad, both, inner, down_inner, *ups, down)
    cut = Cut.of(num_rows, [width], GATED_ROWS)
    num_parts = cut.parts[-1]
    meta, factors = {"RANK": rank, "PADDED": padded_rank(rank)}, tuple(map(float, scalings))
    grad_both, grad_inner = torch.empty_like(both), torch.empty_like(inner)
    grad_ups, grad_down = [torch.empty_like(each) for each in ups], torch.empty_like(down)
    inner_parts = both.new_empty((2, num_parts, num_rows, rank), dtype=torch.float32)
    column_parts = both.new_empty((3, cut.num_strips, width, rank), dtype=torch.float32)
    launch(
        "swiglu_gradients", (cut.num_strips, num_parts), grad, both, inner, down_inner, *ups, down, grad_both,
        inner_parts, column_parts, num_rows, width, inner.stride(0), cut.columns_per_part, num_parts, cut.num_strips,
        *factors, **meta, ROWS=GATED_ROWS, COLUMNS=COLUMNS, num_warps=8, num_stages=2,
    )  # fmt: skip
    launch(
        "sum_swiglu_gradients", (-(-max(num_rows, width) // SUMMED_ROWS), 5), inner_parts, column_parts, grad_inner,
        *grad_ups, grad_down, num_rows, width, grad_inner.stride(0), num_parts, cut.num_strips, *factors,
        **meta, ROWS=SUMMED_ROWS, num_warps=4,
    )  # fmt: skip
    return grad_both, grad_inner, grad_ups[0], grad_ups[1], grad_down
