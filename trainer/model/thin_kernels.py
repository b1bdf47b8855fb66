"""Triton kernels of products of an adapter's rank, for thin.py only; needs Triton.

A product with B [N, r] of small r is limited by the bytes of its [T, N] side, so each kernel reads that side once for
all products that need it. A program computes a strip of rows and a part of the columns. What must be summed over strips
or over parts is written as float32 partial sums, which a second kernel adds in a fixed order: no atomics, equal bits.

Ranks are padded to `PADDED` columns of zeros, at least 16, as matrix instructions want it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(base, rows, columns, row_stride, row_mask, column_mask):
    """[rows, columns] of a matrix with contiguous columns; zeros where masked."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(base + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def product(left, right):
    """The product of two tiles, in float32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def sum_parts(
    parts,
    part_stride,
    count,
    rows,
    num_rows,
    out,
    row_stride,
    column_stride,
    scaling,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store the scaled sum of [num_rows, RANK] parts, in their order."""
    ranks = tl.arange(0, PADDED)
    mask = (rows < num_rows)[:, None] & (ranks < RANK)[None, :]
    cells = rows[:, None] * RANK + ranks[None, :]
    total = tl.zeros(cells.shape, tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * part_stride + cells, mask=mask, other=0.0)
    places = rows.to(tl.int64)[:, None] * row_stride + ranks[None, :] * column_stride
    tl.store(out + places, (total * scaling).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradients(
    grad, up, inner, inner_parts, up_parts, num_rows, width, grad_stride, inner_stride, end_0, end_1, parts_0, parts_1,
    columns_per_part, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of grad B and grad^T (A x), of up to three layers whose columns lie side by side.

    Args:
        grad: [num_rows, width].
        up: B of all layers, [width, RANK].
        inner: A x of all layers, [num_rows, layers * RANK].
        inner_parts: result, [parts, num_rows, RANK].
        up_parts: result, [strips, width, RANK].
        num_rows: T.
        width: columns of all layers.
        grad_stride: of rows.
        inner_stride: of rows.
        end_0: columns of the first layer.
        end_1: columns of the first two.
        parts_0: parts of the first layer.
        parts_1: parts of the first two.
        columns_per_part: multiple of COLUMNS.
        RANK: r.
        PADDED: power of two, at least RANK and 16.
        ROWS: of a strip.
        COLUMNS: read at a time.
    """
    strip, part = tl.program_id(0), tl.program_id(1)
    begin, end, layer, first = 0, end_0, 0, 0
    if part >= parts_0:
        begin, end, layer, first = end_0, end_1, 1, parts_0
    if part >= parts_1:
        begin, end, layer, first = end_1, width, 2, parts_1
    begin += (part - first) * columns_per_part
    end = tl.minimum(end, begin + columns_per_part)
    rows, ranks = strip * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    is_row, is_rank = rows < num_rows, ranks < RANK
    own = tile(inner + layer * RANK, rows, ranks, inner_stride, is_row, is_rank)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for column in range(begin, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        is_column = columns < end
        values = tile(grad, rows, columns, grad_stride, is_row, is_column)
        total = tl.dot(values, tile(up, columns, ranks, RANK, is_column, is_rank), total, input_precision="ieee")
        cells = (strip * width + columns).to(tl.int64)[:, None] * RANK + ranks[None, :]
        tl.store(up_parts + cells, product(tl.trans(values), own), mask=is_column[:, None] & is_rank[None, :])
    cells = (part * num_rows + rows).to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(inner_parts + cells, total, mask=is_row[:, None] & is_rank[None, :])


@triton.jit
def sum_gradients(
    inner_parts, up_parts, grad_inner, up_0, up_1, up_2, num_rows, width, inner_stride, end_0, end_1, parts_0, parts_1,
    num_parts, num_strips, row_blocks, scaling_0, scaling_1, scaling_2,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum what `gradients` wrote; the second axis of the grid counts layers."""
    block, layer = tl.program_id(0), tl.program_id(1)
    begin, end, first, last, scaling, out = 0, end_0, 0, parts_0, scaling_0, up_0
    if layer == 1:
        begin, end, first, last, scaling, out = end_0, end_1, parts_0, parts_1, scaling_1, up_1
    if layer == 2:
        begin, end, first, last, scaling, out = end_1, width, parts_1, num_parts, scaling_2, up_2
    rows = tl.arange(0, ROWS)
    if block < row_blocks:
        parts, stride = inner_parts + tl.cast(first, tl.int64) * num_rows * RANK, num_rows * RANK
        sum_parts(
            parts, stride, last - first, block * ROWS + rows, num_rows,
            grad_inner + layer * RANK, inner_stride, 1, scaling, RANK, PADDED,
        )  # fmt: skip
    else:
        parts, stride = up_parts + tl.cast(begin, tl.int64) * RANK, width * RANK
        sum_parts(
            parts, stride, num_strips, (block - row_blocks) * ROWS + rows, end - begin,
            out, RANK, 1, scaling, RANK, PADDED,
        )  # fmt: skip
