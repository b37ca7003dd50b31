"""The experts of a rank as one function: rows taken, two products, the activation between, rows summed.

A token's rows are copies of it, one for each expert it goes to. They are never all there at once: a few
hundred rows at a time are taken, multiplied, activated and multiplied again while they are in the cache,
and a token's results are summed in one pass at the end. For the backward only the first product is kept;
the activation is made again. The gate's weight is applied to the activation, which is narrower than a row.
Legend: S source rows, K slots of each, N rows in expert order, D hidden size, F expert width, e experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.activation import TILED, Activation
from parallel.linear import add_weight_gradient, now_or_later, queue_here, segments_of
from parallel.runs import runs

_ROWS = 1536  # of several experts that are worked on at a time


@dataclass(frozen=True)
class Order:
    """Where each row in expert order comes from, and where each source row's rows are.

    `index_N` None: the rows are in expert order already, one for each source row, and so are the slots.
    """

    index_N: Tensor | None  # source row of each row
    slot_SK: Tensor | None  # row of each of a source row's slots, -1 for none


IN_ORDER = Order(None, None)


class _TakeRows(torch.autograd.Function):
    """rows[index]; the gradient of a row is summed over its slots, in slot order: deterministic."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, slot_SK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_SK)
        return rows.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_SK,) = ctx.saved_tensors
        return _add_up(grads[0], slot_SK), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, slot_SK: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        return _add_up(rows, slot_SK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        return grads[0].index_select(0, index_N), None, None


def take_rows(rows: Tensor, order: Order) -> Tensor:
    """Copy source rows [S, D] into expert order: [N, D]."""
    if order.index_N is None:
        return rows
    taken: Tensor = _TakeRows.apply(rows, order.index_N, order.slot_SK)
    return taken


def sum_rows(rows: Tensor, order: Order) -> Tensor:
    """Sum the rows [N, D] of each source row: [S, D], in fp32 before it is rounded."""
    if order.index_N is None:
        return rows
    summed: Tensor = _SumRows.apply(rows, order.index_N, order.slot_SK)
    return summed


def _add_up(rows: Tensor, slot_SK: Tensor) -> Tensor:
    """The sum of rows[slot] over a source row's slots, without copies of the rows: [S, D]."""
    if slot_SK.shape[1] == 1 and len(rows) == len(slot_SK):
        return rows.index_select(0, slot_SK[:, 0])
    if rows.numel() == slot_SK.numel() * rows.shape[1]:
        return F.embedding_bag(slot_SK, rows, mode="sum")
    has_row = slot_SK >= 0
    ends = has_row.sum(1).cumsum(0)
    begins = F.pad(ends[:-1], (1, 0))
    return F.embedding_bag(slot_SK[has_row], rows, begins, mode="sum")


def gated_experts(
    source: Tensor,
    weights_N: Tensor,
    order: Order,
    counts: Sequence[int],
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    by: Activation = TILED,
) -> Tensor:
    """Each source row's weighted sum of what its experts make of it: [S, D] -> [S, D].

    `counts[i]` rows of local expert i lie one after the other, in the order of the stacks: `gate_up`
    [e, 2F, D], gate rows first, and `down` [e, D, F]. `weights_N` [N] has a gradient, too. Gradients of
    the stacks are made as parallel/linear.py says.
    """
    out: Tensor = _GatedExperts.apply(source, weights_N, order, counts, by, len(gate_up), *gate_up, *down)
    return out


class _GatedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        weights_N: Tensor,
        order: Order,
        counts: Sequence[int],
        by: Activation,
        num_stacks: int,
        *stacks: Tensor,
    ) -> Tensor:
        gate_up, down = stacks[:num_stacks], stacks[num_stacks:]
        num_rows, width = sum(counts), down[0].shape[2]
        products = source.new_empty(num_rows, 2 * width)
        rows = source.new_empty(num_rows, source.shape[1])
        ctx.chunks = list(_chunks(counts, gate_up))
        taken, activations = _workspaces(ctx.chunks, source, source.shape[1], width)
        for chunk in ctx.chunks:
            product = chunk.times(_take(source, order, chunk.rows, taken), gate_up, products[chunk.rows])
            by.forward(product, weights_N[chunk.rows], activations[: len(product)])
            chunk.times(activations[: len(product)], down, rows[chunk.rows])
        ctx.save_for_backward(source, weights_N, products)
        ctx.order, ctx.by, ctx.gate_up, ctx.down, ctx.queue = order, by, gate_up, down, queue_here()
        return rows if order.slot_SK is None else _add_up(rows, order.slot_SK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, weights_N, products = ctx.saved_tensors
        order, grad = ctx.order, grads[0].contiguous()
        taken, of_activations = _workspaces(ctx.chunks, grad, grad.shape[1], products.shape[1] // 2)
        later = _WeightGradients(ctx, source, grad, taken)
        grad_weights = torch.empty_like(weights_N)
        grad_rows = source.new_empty(len(products), source.shape[1]) if ctx.needs_input_grad[0] else None
        for chunk in ctx.chunks:
            product = products[chunk.rows]
            of_activation = of_activations[: len(product)]
            chunk.times_back(_take(grad, order, chunk.rows, taken), ctx.down, of_activation)
            activation = torch.empty_like(of_activation) if later.wants(chunk) else None
            of_product = torch.empty_like(product)
            weights, of_weights = weights_N[chunk.rows], grad_weights[chunk.rows]
            ctx.by.backward(product, of_activation, of_product, weights, of_weights, activation)
            if grad_rows is not None:
                chunk.times_back(of_product, ctx.gate_up, grad_rows[chunk.rows])
            if activation is not None:
                now_or_later(later.queue, partial(later.make, chunk, activation, of_product))
        if grad_rows is not None and order.slot_SK is not None:
            grad_rows = _add_up(grad_rows, order.slot_SK)
        return grad_rows, grad_weights, None, None, None, None, *later.made


class _WeightGradients:
    """The gradients of the stacks: into their buffers, now or later, or into tensors of their own at once."""

    def __init__(self, ctx: Any, source: Tensor, grad: Tensor, taken: Tensor) -> None:
        self._source, self._grad, self._order, self._taken = source, grad, ctx.order, taken
        self._stacks, self._needed = (ctx.gate_up, ctx.down), ctx.needs_input_grad[6:]
        stacks = (*ctx.gate_up, *ctx.down)
        self.made = [
            torch.empty_like(weight) if needed and not hasattr(weight, "main_grad") else None
            for weight, needed in zip(stacks, self._needed, strict=True)
        ]
        self._clear_those_without_rows(ctx.chunks)
        self.queue = ctx.queue if all(made is None for made in self.made) else None

    def _clear_those_without_rows(self, chunks: Sequence["_Chunk"]) -> None:
        found = {(stack, expert) for chunk in chunks for stack, expert, _ in chunk.segments}
        for index, made in enumerate(self.made):
            for expert, gradient in enumerate(() if made is None else made):
                if (index % len(self._stacks[0]), expert) not in found:
                    gradient.zero_()

    def wants(self, chunk: "_Chunk") -> bool:
        """Whether an expert of a chunk is trained: for frozen ones nothing is made or held."""
        apart = len(self._stacks[0])
        return any(self._needed[stack] or self._needed[apart + stack] for stack, _, _ in chunk.segments)

    def make(self, chunk: "_Chunk", activation: Tensor, of_product: Tensor) -> None:
        """Those of one chunk, from the activation and the gradient of the product that made it."""
        gate_up, down = self._stacks
        if any(self._needed[len(gate_up) :]):
            taken = _take(self._grad, self._order, chunk.rows, self._taken)
            self._add(chunk, down, len(gate_up), taken, activation)
        if any(self._needed[: len(gate_up)]):
            taken = _take(self._source, self._order, chunk.rows, self._taken)
            self._add(chunk, gate_up, 0, of_product, taken)

    def _add(
        self, chunk: "_Chunk", stacks: Sequence[Tensor], first: int, grads: Tensor, rows: Tensor
    ) -> None:
        for stack, expert, place in chunk.segments:
            made = self.made[first + stack]
            if made is not None:
                torch.mm(grads[place].t(), rows[place], out=made[expert])
            elif self._needed[first + stack]:
                add_weight_gradient(stacks[stack], expert, grads[place], rows[place])


@dataclass(frozen=True)
class _Chunk:
    """A stretch of rows, and its experts: which stack, which expert of that, which rows of the stretch."""

    rows: slice
    segments: tuple[tuple[int, int, slice], ...]

    def times(self, rows: Tensor, stacks: Sequence[Tensor], out: Tensor) -> Tensor:
        """Each expert's rows times its weight, transposed."""
        for stack, expert, place in self.segments:
            torch.mm(rows[place], stacks[stack][expert].t(), out=out[place])
        return out

    def times_back(self, grads: Tensor, stacks: Sequence[Tensor], out: Tensor) -> Tensor:
        """Each expert's rows times its weight."""
        for stack, expert, place in self.segments:
            torch.mm(grads[place], stacks[stack][expert], out=out[place])
        return out


def _chunks(counts: Sequence[int], stacks: Sequence[Tensor]) -> Iterator[_Chunk]:
    """Experts that follow each other, while they have few rows together; a larger one by itself."""
    found = [(stack, *span) for stack, spans in enumerate(segments_of(counts, stacks)) for span in spans]
    for run in runs(found, lambda span: span[3] - span[2], _ROWS):
        first = run[0][2]
        within = tuple((stack, expert, slice(b - first, e - first)) for stack, expert, b, e in run)
        yield _Chunk(slice(first, run[-1][3]), within)


def _workspaces(chunks: Sequence[_Chunk], like: Tensor, *widths: int) -> list[Tensor]:
    """Memory for a chunk's rows of these widths, that stays in the cache from one chunk to the next."""
    most = max((chunk.rows.stop - chunk.rows.start for chunk in chunks), default=0)
    return [like.new_empty(most, width) for width in widths]


def _take(rows: Tensor, order: Order, place: slice, out: Tensor) -> Tensor:
    """The source rows of a stretch, by way of a workspace."""
    if order.index_N is None:
        return rows[place]
    return torch.index_select(rows, 0, order.index_N[place], out=out[: place.stop - place.start])
