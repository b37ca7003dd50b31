"""The experts path on CUDA: the same function as grouped.py's, without a loop over experts.

One grouped product per projection over rows in expert order; between them a kernel that applies the
activation and the gate weight, and beside them kernels that bring rows into that order and back and add
weights' gradients straight into their buffers (kernels/). Nothing is read from the device. Kept for the
backward are the source rows, the gate and up products and indices; the backward writes into the products'
memory, so it runs once.
Legend: S source rows, N rows in expert order, K slots, D hidden size, F expert width, e experts of a stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.errors import UserError
from parallel.grouped import Order
from parallel.kernels.rows import permute, unpermute
from parallel.kernels.swiglu import weighted_swiglu, weighted_swiglu_back
from parallel.kernels.weight_gradient import add_weight_gradients
from parallel.linear import Queue, now_or_later, queue_here


def gated_experts(
    source: Tensor,
    weights_N: Tensor,
    order: Order,
    counts: Sequence[int] | Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
) -> Tensor:
    """source [S, D] -> [S, D]: the sum over the rows n of s of w_n * expert(source[s]); see grouped.py.

    `counts[i]` rows of local expert i, on the host or, with one stack, on the device; rows beyond their sum
    are skipped. gate_up stacks [e, 2F, D], down stacks [e, D, F]. UserError where D or F is no multiple of 16
    bytes.
    """
    unit = 16 // source.element_size()
    hidden, width = source.shape[1], down[0].shape[2]
    if hidden % unit or width % unit:
        raise UserError(
            "`model.hidden_size` and `model.moe_intermediate_size` / `layout.etp` must be multiples of "
            f"{unit} on a GPU, but are {hidden} and {width}: change them"
        )
    segments = _segments(counts, tuple(map(len, gate_up)), source.device)
    out: Tensor = _GatedExperts.apply(source, weights_N, order, segments, *gate_up, *down)
    return out


@dataclass(frozen=True)
class _Segment:
    """The rows of one stack's experts, and where among them each expert's begin, [e + 1], and the end."""

    rows: slice
    offsets: Tensor


def _segments(
    counts: Sequence[int] | Tensor, sizes: tuple[int, ...], device: torch.device
) -> tuple[_Segment, ...]:
    if isinstance(counts, Tensor):
        assert len(sizes) == 1, "counts on the device are those of one stack"
        return (_Segment(slice(None), F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))),)
    assert len(counts) == sum(sizes), f"{len(counts)} counts for {sum(sizes)} experts"
    found, begin = [], 0
    for first, last in pairwise(accumulate(sizes, initial=0)):
        offsets = torch.tensor(list(accumulate(counts[first:last], initial=0)), dtype=torch.int32)
        end = begin + int(offsets[-1])
        if device.type == "cuda":  # from pinned memory the copy is not waited for
            offsets = offsets.pin_memory().to(device, non_blocking=True)
        found.append(_Segment(slice(begin, end), offsets))
        begin = end
    return tuple(found)


class _GatedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        weights_N: Tensor,
        order: Order,
        segments: tuple[_Segment, ...],
        *stacks: Tensor,
    ) -> Tensor:
        source, weights_N = source.contiguous(), weights_N.contiguous()
        gate_up, down = stacks[: len(segments)], stacks[len(segments) :]
        end = reduce(torch.add, [segment.offsets[-1:] for segment in segments])
        products = _grouped(_in_order(source, order), segments, [weight.mT for weight in gate_up])
        act = weighted_swiglu(products, weights_N, end)
        ctx.needs = ctx.needs_input_grad[4:][: len(segments)], ctx.needs_input_grad[4:][len(segments) :]
        ctx.save_for_backward(source if any(ctx.needs[0]) else None, products, weights_N)
        ctx.order, ctx.segments, ctx.end, ctx.queue = order, segments, end, queue_here()
        ctx.gate_up, ctx.down = gate_up, down
        return _summed(_grouped(act, segments, [weight.mT for weight in down]), order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, products, weights_N = ctx.saved_tensors
        order, segments, grad = ctx.order, ctx.segments, grads[0].contiguous()
        act = _grouped(_in_order(grad, order), segments, ctx.down)  # its gradient, and then itself
        torch.autograd.graph.increment_version(products)  # a second backward fails, rather than be wrong
        grad_weights = weighted_swiglu_back(act, products, weights_N, ctx.end)
        make = partial(_weight_gradients, segments=segments, queue=ctx.queue)
        made_gate_up = make(ctx.gate_up, ctx.needs[0], grad=(products, None), rows=(source, order.index_N))
        made_down = make(ctx.down, ctx.needs[1], grad=(grad, order.index_N), rows=(act, None))
        grad_source = None
        if ctx.needs_input_grad[0]:
            grad_source = _summed(_grouped(products, segments, ctx.gate_up), order)
        return grad_source, grad_weights, None, None, *made_gate_up, *made_down


def _in_order(rows: Tensor, order: Order) -> Tensor:
    """Source rows [S, D], or gradients of their sums, for each row in expert order: [N, D]."""
    return rows if order.index_N is None else permute(rows, order.index_N)


def _summed(rows: Tensor, order: Order) -> Tensor:
    """Rows in expert order [N, D], summed for each source row: [S, D]."""
    return rows if order.slot_SK is None else unpermute(rows, order.slot_SK)


def _grouped(rows: Tensor, segments: Sequence[_Segment], weights: Sequence[Tensor]) -> Tensor:
    """Rows [N, A] times their experts' weights, of stacks [e, A, B]: [N, B], undefined beyond the last."""
    parts = []
    for weight, segment in zip(weights, segments, strict=True):
        part = rows[segment.rows]
        product = F.grouped_mm(part, weight, offs=segment.offsets[1:]) if len(part) else None
        parts.append(part.new_empty(0, weight.shape[2]) if product is None else product)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


Indexed = tuple[Tensor, Tensor | None]  # rows, and which of them each in expert order is; None: as they lie


def _weight_gradients(
    weights: Sequence[Tensor],
    needed: Sequence[bool],
    *,
    segments: Sequence[_Segment],
    grad: Indexed,
    rows: Indexed,
    queue: Queue | None,
) -> list[Tensor | None]:
    """Add grad^T rows to each weight's gradient buffer, now or later, or make a gradient for autograd."""
    made: list[Tensor | None] = [None] * len(weights)
    for i, (weight, segment) in enumerate(zip(weights, segments, strict=True)):
        if not needed[i]:
            continue
        (grads, grad_index), (inputs, row_index) = _part(grad, segment), _part(rows, segment)
        work = partial(
            add_weight_gradients,
            grad=grads,
            rows=inputs,
            offsets=segment.offsets,
            grad_index_N=grad_index,
            row_index_N=row_index,
        )
        if hasattr(weight, "main_grad"):
            now_or_later(queue, partial(work, weight.main_grad))
        else:
            work(fresh := torch.zeros_like(weight))
            made[i] = fresh
    return made


def _part(indexed: Indexed, segment: _Segment) -> Indexed:
    """The rows of one stack's experts."""
    rows, index = indexed
    return (rows[segment.rows], None) if index is None else (rows, index[segment.rows])
