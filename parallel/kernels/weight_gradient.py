"""Gradients of all experts' weights, added straight into their buffers by one kernel.

A program has a tile of one expert's weight and walks that expert's rows, of which only the device need know
how many there are. Rows, and gradients, may lie in the order of their source: the kernel gathers them by
index, so that neither is kept in K copies. An expert without rows costs nothing.
Legend: N rows in expert order, S source rows, e experts, O outputs, I inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels import plain
from parallel.kernels.where import block, by_kernel


def add_weight_gradients(
    target: Tensor,
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    grad_index_N: Tensor | None = None,
    row_index_N: Tensor | None = None,
) -> None:
    """target [e, O, I] += grad^T rows of each expert's rows, summed in fp32 before they are added.

    grad [N, O] and rows [N, I], or with an index [N] each: [S, O] or [S, I], row n being that of index[n].
    offsets [e + 1], int32 on the device: where each expert's rows begin, and the end. The target may be fp32
    or narrower.
    """
    if not by_kernel(target):
        return plain.add_weight_gradients(target, grad, rows, offsets, grad_index_N, row_index_N)
    num_experts, num_outputs, num_inputs = target.shape
    assert target.is_contiguous() and offsets.is_contiguous()
    tile_outputs, tile_inputs = block(num_outputs, 128, 16), block(num_inputs, 128, 16)
    exact = rows.dtype == torch.float32
    grid = (triton.cdiv(num_outputs, tile_outputs) * triton.cdiv(num_inputs, tile_inputs), num_experts)
    _add[grid](
        target,
        grad.contiguous(),
        rows.contiguous(),
        offsets,
        grad_index_N,
        row_index_N,
        num_outputs,
        num_inputs,
        tile_outputs,
        tile_inputs,
        ROWS=32 if exact else 64,
        WIDEN=triton.knobs.runtime.interpret,
        num_warps=8,
        num_stages=2 if exact else 4,
    )


@triton.jit
def _add(
    target: tl.tensor,
    grad: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    grad_index: tl.tensor,
    row_index: tl.tensor,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    expert = tl.program_id(1)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    if begin == end:
        return
    across = tl.cdiv(INPUTS, TILE_INPUTS)
    output = tl.program_id(0) // across * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    input = tl.program_id(0) % across * TILE_INPUTS + tl.arange(0, TILE_INPUTS)
    total = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        there = row < end
        grad_row = row if grad_index is None else tl.load(grad_index + row, mask=there, other=0)
        input_row = row if row_index is None else tl.load(row_index + row, mask=there, other=0)
        grads = tl.load(
            grad + grad_row[:, None] * OUTPUTS + output[None, :],
            mask=there[:, None] & (output < OUTPUTS)[None, :],
            other=0.0,
        )
        inputs = tl.load(
            rows + input_row[:, None] * INPUTS + input[None, :],
            mask=there[:, None] & (input < INPUTS)[None, :],
            other=0.0,
        )
        if WIDEN:  # the interpreter would multiply the bits of bf16
            grads, inputs = grads.to(tl.float32), inputs.to(tl.float32)
        total = tl.dot(tl.trans(grads), inputs, total, input_precision="ieee")
    at = target + expert.to(tl.int64) * OUTPUTS * INPUTS + output[:, None] * INPUTS + input[None, :]
    inside = (output < OUTPUTS)[:, None] & (input < INPUTS)[None, :]
    total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(target.dtype.element_ty), mask=inside)
