"""Rows into expert order and back: a gather, and a sum over the slots of a row without atomics.

Each output row is one program's, which adds a source row's slots in their order: the same bits every time.
Legend: S source rows, N rows in expert order, K slots, D hidden size.
"""

import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels import plain
from parallel.kernels.where import block, by_kernel


def permute(rows: Tensor, index_N: Tensor) -> Tensor:
    """Copy rows [S, D] to [N, D] by index, int64."""
    if not by_kernel(rows):
        return plain.permute(rows, index_N)
    rows, (width, columns) = rows.contiguous(), _columns(rows)
    out = rows.new_empty(len(index_N), width)
    _permute[(len(out), triton.cdiv(width, columns))](rows, index_N.contiguous(), out, width, columns)
    return out


def unpermute(rows: Tensor, slots_SK: Tensor) -> Tensor:
    """Sum rows [N, D] over each source row's slots [S, K], int64, -1 for none: [S, D], summed in fp32."""
    if not by_kernel(rows):
        return plain.unpermute(rows, slots_SK)
    rows, (width, columns) = rows.contiguous(), _columns(rows)
    num_rows, num_slots = slots_SK.shape
    out = rows.new_empty(num_rows, width)
    grid = (num_rows, triton.cdiv(width, columns))
    _unpermute[grid](rows, slots_SK.contiguous(), out, width, num_slots, columns)
    return out


def _columns(rows: Tensor) -> tuple[int, int]:
    """The width of rows and how much of it a program moves: 16 bytes for each of 128 threads."""
    return rows.shape[1], block(rows.shape[1], 2048 // rows.element_size())


@triton.jit
def _permute(
    rows: tl.tensor, index: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(rows + tl.load(index + row) * WIDTH + column, mask=column < WIDTH)
    tl.store(out + row * WIDTH + column, values, mask=column < WIDTH)


@triton.jit
def _unpermute(
    rows: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(SLOTS):
        slot = tl.load(slots + row * SLOTS + k)
        there = column < tl.where(slot >= 0, WIDTH, 0)
        total += tl.load(rows + slot * WIDTH + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)
