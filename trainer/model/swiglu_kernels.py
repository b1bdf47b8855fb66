"""Triton kernels of a gated layer, silu(gate) * up, that add the adapters' products in registers; for thin.py only.

    gate = (W_gate x) + s_gate * B_gate (A_gate x),  up likewise,  h = silu(gate) * up,  A_down h

The adapters' side reads and writes nothing as wide as h. Strips, parts and their sums: as in thin_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trainer.model.thin_kernels import product, sum_parts, tile


@triton.jit
def _transposed_tile(base, rows, columns, column_stride, row_mask, column_mask):
    """[rows, columns] of the transpose of a matrix whose rows lie `column_stride` apart."""
    offsets = rows[:, None] + columns[None, :] * column_stride
    return tl.load(base + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def swiglu(
    both, inner, gate_up, up_up, down, hidden, inner_parts, num_rows, width, inner_stride, columns_per_part,
    gate_scaling, up_scaling,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h, and partial sums of A_down h.

    Args:
        both: base products of gate and up side by side, [num_rows, 2 * width].
        inner: A x of gate and up, [num_rows, 2 * RANK].
        gate_up: B of gate, [width, RANK].
        up_up: B of up.
        down: A of the layer that reads h, [RANK, width].
        hidden: result h, [num_rows, width].
        inner_parts: result, [parts, num_rows, RANK].
        num_rows: T.
        width: of h.
        inner_stride: of rows.
        columns_per_part: multiple of COLUMNS.
        gate_scaling: factor of the adapter.
        up_scaling: factor of the adapter.
        RANK: r.
        PADDED: power of two, at least RANK and 16.
        ROWS: of a strip.
        COLUMNS: computed at a time.
    """
    strip, part = tl.program_id(0), tl.program_id(1)
    rows, ranks = strip * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    is_row, is_rank = rows < num_rows, ranks < RANK
    of_gate = tile(inner, rows, ranks, inner_stride, is_row, is_rank)
    of_up = tile(inner + RANK, rows, ranks, inner_stride, is_row, is_rank)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    begin = part * columns_per_part
    end = tl.minimum(width, begin + columns_per_part)
    for column in range(begin, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        is_column = columns < end
        gate = tile(both, rows, columns, 2 * width, is_row, is_column).to(tl.float32)
        up = tile(both + width, rows, columns, 2 * width, is_row, is_column).to(tl.float32)
        gate += gate_scaling * product(of_gate, _transposed_tile(gate_up, ranks, columns, RANK, is_rank, is_column))
        up += up_scaling * product(of_up, _transposed_tile(up_up, ranks, columns, RANK, is_rank, is_column))
        value = (gate * tl.sigmoid(gate) * up).to(hidden.dtype.element_ty)
        cells = rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(hidden + cells, value, mask=is_row[:, None] & is_column[None, :])
        own = _transposed_tile(down, columns, ranks, width, is_column, is_rank)
        total = tl.dot(value, own, total, input_precision="ieee")
    cells = (part * num_rows + rows).to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(inner_parts + cells, total, mask=is_row[:, None] & is_rank[None, :])


@triton.jit
def swiglu_gradients(
    grad, both, inner, down_inner, gate_up, up_up, down, grad_both, inner_parts, column_parts,
    num_rows, width, inner_stride, columns_per_part, num_parts, num_strips, gate_scaling, up_scaling,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up, and partial sums of all products of the adapters with them and with h.

    Args:
        grad: W_down^T times the gradient of the down layer's output, [num_rows, width].
        both: as in `swiglu`.
        inner: as in `swiglu`.
        down_inner: gradient of A_down h, [num_rows, RANK].
        gate_up: as in `swiglu`.
        up_up: as in `swiglu`.
        down: as in `swiglu`.
        grad_both: result, [num_rows, 2 * width].
        inner_parts: result, of grad_gate B_gate and grad_up B_up, [2, parts, num_rows, RANK].
        column_parts: result, of grad_gate^T (A x), grad_up^T (A x) and h^T down_inner, [3, strips, width, RANK].
        num_rows: T.
        width: of h.
        inner_stride: of rows.
        columns_per_part: multiple of COLUMNS.
        num_parts: second axis of the grid.
        num_strips: first axis of the grid.
        gate_scaling: factor of the adapter.
        up_scaling: factor of the adapter.
        RANK: r.
        PADDED: power of two, at least RANK and 16.
        ROWS: of a strip.
        COLUMNS: computed at a time.
    """
    strip, part = tl.program_id(0), tl.program_id(1)
    rows, ranks = strip * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    is_row, is_rank = rows < num_rows, ranks < RANK
    of_gate = tile(inner, rows, ranks, inner_stride, is_row, is_rank)
    of_up = tile(inner + RANK, rows, ranks, inner_stride, is_row, is_rank)
    of_down = tile(down_inner, rows, ranks, RANK, is_row, is_rank)
    gate_total = tl.zeros((ROWS, PADDED), tl.float32)
    up_total = tl.zeros((ROWS, PADDED), tl.float32)
    stride = tl.cast(num_strips, tl.int64) * width * RANK
    begin = part * columns_per_part
    end = tl.minimum(width, begin + columns_per_part)
    for column in range(begin, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        is_column = columns < end
        gate_b = tile(gate_up, columns, ranks, RANK, is_column, is_rank)
        up_b = tile(up_up, columns, ranks, RANK, is_column, is_rank)
        gate = tile(both, rows, columns, 2 * width, is_row, is_column).to(tl.float32)
        gate += gate_scaling * product(of_gate, tl.trans(gate_b))
        up = tile(both + width, rows, columns, 2 * width, is_row, is_column).to(tl.float32)
        up += up_scaling * product(of_up, tl.trans(up_b))
        outer = tile(grad, rows, columns, width, is_row, is_column).to(tl.float32)
        outer += product(of_down, tile(down, ranks, columns, width, is_rank, is_column))
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        value = (silu * up).to(both.dtype.element_ty)
        grad_gate = (outer * up * (sigmoid + silu * (1.0 - sigmoid))).to(both.dtype.element_ty)
        grad_up = (outer * silu).to(both.dtype.element_ty)
        is_cell = is_row[:, None] & is_column[None, :]
        cells = rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
        tl.store(grad_both + cells, grad_gate, mask=is_cell)
        tl.store(grad_both + width + cells, grad_up, mask=is_cell)
        gate_total = tl.dot(grad_gate, gate_b, gate_total, input_precision="ieee")
        up_total = tl.dot(grad_up, up_b, up_total, input_precision="ieee")
        is_part = is_column[:, None] & is_rank[None, :]
        places = column_parts + (strip * width + columns).to(tl.int64)[:, None] * RANK + ranks[None, :]
        tl.store(places, product(tl.trans(grad_gate), of_gate), mask=is_part)
        tl.store(places + stride, product(tl.trans(grad_up), of_up), mask=is_part)
        tl.store(places + 2 * stride, product(tl.trans(value), of_down), mask=is_part)
    is_part = is_row[:, None] & is_rank[None, :]
    places = inner_parts + (part * num_rows + rows).to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(places, gate_total, mask=is_part)
    tl.store(places + tl.cast(num_parts, tl.int64) * num_rows * RANK, up_total, mask=is_part)


@triton.jit
def sum_swiglu_gradients(
    inner_parts, column_parts, grad_inner, gate_up, up_up, down, num_rows, width, inner_stride, num_parts, num_strips,
    gate_scaling, up_scaling, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum what `swiglu_gradients` wrote: gradients of A x of gate and up, of both B, and of A_down, in turn."""
    job = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stride, part_stride = tl.cast(num_strips, tl.int64) * width * RANK, num_rows * RANK
    if job == 0:
        sum_parts(
            inner_parts, part_stride, num_parts, rows, num_rows, grad_inner, inner_stride, 1, gate_scaling, RANK, PADDED
        )
    elif job == 1:
        parts = inner_parts + tl.cast(num_parts, tl.int64) * part_stride
        sum_parts(
            parts, part_stride, num_parts, rows, num_rows, grad_inner + RANK, inner_stride, 1, up_scaling, RANK, PADDED
        )
    elif job == 2:
        sum_parts(column_parts, width * RANK, num_strips, rows, width, gate_up, RANK, 1, gate_scaling, RANK, PADDED)
    elif job == 3:
        sum_parts(
            column_parts + stride, width * RANK, num_strips, rows, width, up_up, RANK, 1, up_scaling, RANK, PADDED
        )
    else:
        sum_parts(column_parts + 2 * stride, width * RANK, num_strips, rows, width, down, 1, width, 1.0, RANK, PADDED)


@triton.jit
def sum_swiglu(
    inner_parts, inner, num_rows, num_parts, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum what `swiglu` wrote: A_down h."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_parts(inner_parts, num_rows * RANK, num_parts, rows, num_rows, inner, RANK, 1, 1.0, RANK, PADDED)
