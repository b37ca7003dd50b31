"""The experts' activation, w * silu(gate) * up, with the gate weight w in it, and its backward in one pass.

The backward makes the activation again, which the gradient of the next weight wants, and needs no memory:
each result takes the place of an input of its size. A program has one row, so a weight's gradient is a sum
within it.
Legend: N rows, F expert width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels import plain
from parallel.kernels.where import block, by_kernel

COLUMNS = 1024  # of a row at a time


def weighted_swiglu(gate_up: Tensor, weights_N: Tensor, end: Tensor) -> Tensor:
    """gate_up [N, 2F], gate then up, and weights [N] in fp32 -> [N, F] = w silu(gate) up, reckoned in fp32.

    `end`, int32 on the device, is the number of rows that count: what the others hold is undefined.
    """
    if not by_kernel(gate_up):
        return plain.weighted_swiglu(gate_up, weights_N, end)
    width = gate_up.shape[1] // 2
    act = gate_up.new_empty(len(gate_up), width)
    assert gate_up.is_contiguous() and weights_N.is_contiguous()
    _forward[(len(act),)](gate_up, weights_N, act, end, width, block(width, COLUMNS))
    return act


def weighted_swiglu_back(grad_act: Tensor, gate_up: Tensor, weights_N: Tensor, end: Tensor) -> Tensor:
    """The gradient of the weights [N] in fp32, 0 from row `end` on.

    In place: grad_act [N, F] becomes the activation, gate_up [N, 2F] its own gradient.
    """
    if not by_kernel(gate_up):
        return plain.weighted_swiglu_back(grad_act, gate_up, weights_N, end)
    width = gate_up.shape[1] // 2
    grad_weights = torch.zeros_like(weights_N)
    assert grad_act.is_contiguous() and gate_up.is_contiguous() and weights_N.is_contiguous()
    _backward[(len(grad_act),)](grad_act, gate_up, weights_N, grad_weights, end, width, block(width, COLUMNS))
    return grad_weights


@triton.jit
def _forward(
    gate_up: tl.tensor,
    weights: tl.tensor,
    act: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end):
        return
    weight = tl.load(weights + row)
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < WIDTH
        gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=there).to(tl.float32)
        up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=there).to(tl.float32)
        made = weight * gate * tl.sigmoid(gate) * up
        tl.store(act + row * WIDTH + column, made.to(act.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    grad_act: tl.tensor,
    gate_up: tl.tensor,
    weights: tl.tensor,
    grad_weights: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end):
        return
    weight = tl.load(weights + row)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    kind = gate_up.dtype.element_ty
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < WIDTH
        at_act = grad_act + row * WIDTH + column
        at_gate = gate_up + row * 2 * WIDTH + column
        at_up = at_gate + WIDTH
        grad = tl.load(at_act, mask=there, other=0.0).to(tl.float32)
        gate = tl.load(at_gate, mask=there, other=0.0).to(tl.float32)
        up = tl.load(at_up, mask=there, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += grad * silu * up
        slope = sigmoid + silu * (1 - sigmoid)
        tl.store(at_gate, (grad * weight * up * slope).to(kind), mask=there)
        tl.store(at_up, (grad * weight * silu).to(kind), mask=there)
        tl.store(at_act, (weight * silu * up).to(kind), mask=there)
    tl.store(grad_weights + row, tl.sum(grad_weight, 0))
