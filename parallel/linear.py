"""Every matrix product with a weight, and the only place that makes weight gradients.

A weight that carries `main_grad` (an fp32 buffer, see zero.py) has its gradient added straight
into it; a weight without one gets an ordinary `.grad`, so that a layer works alone in a notebook.
The first kind need not be made at once: the backward of a product recorded inside `deferring(queue)`
only queues it, for whoever walks the tape to make when there is nothing better to do.
A frozen weight gets none, and nothing is kept for it. A layer may hold a part of its weight; moving what
the parts need is said where the layer is used. It may carry an adapter (lora.py), which adds to its outputs.
Legend: N rows, I inputs, O outputs, e experts of this rank.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import Group, group_rank, group_size
from parallel.shards import Cut, mark_cut, mark_experts


class Queue(deque[Callable[[], None]]):
    """What is yet to be done, the oldest first. While it is not open everything is done at once."""

    is_open = True


_queue: ContextVar[Queue | None] = ContextVar("_queue", default=None)


@contextmanager
def deferring(queue: Queue) -> Iterator[None]:
    """Products recorded inside put the making of their weights' gradients into a queue."""
    token = _queue.set(queue)
    try:
        yield
    finally:
        _queue.reset(token)


def queue_here() -> Queue | None:
    """Where the products that are being recorded put their weights' gradients; None: nowhere."""
    return _queue.get()


def now_or_later(queue: Queue | None, work: Callable[[], None]) -> None:
    """Do it, or put it where weights' gradients wait."""
    if queue is None or not queue.is_open:
        work()
    else:
        queue.append(work)


def add_weight_gradient(weight: Tensor, index: int | slice | None, grad: Tensor, rows: Tensor) -> None:
    """Add grad^T rows, [O, I] from [..., O] and [..., I], to the gradient buffer of a weight or of a part."""
    target = weight.main_grad if index is None else weight.main_grad[index]  # type: ignore[attr-defined]
    grad, rows = grad.flatten(0, -2), rows.flatten(0, -2)
    if target.dtype == grad.dtype:
        target.addmm_(grad.t(), rows)
    else:
        target.add_(grad.t() @ rows)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows)
        ctx.weight, ctx.queue = weight, queue_here()
        return F.linear(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, grad = ctx.weight, grads[0]
        grad_rows = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_rows, None
        (rows,) = ctx.saved_tensors
        if not hasattr(weight, "main_grad"):
            return grad_rows, grad.flatten(0, -2).t() @ rows.flatten(0, -2)
        now_or_later(ctx.queue, partial(add_weight_gradient, weight, None, grad, rows))
        return grad_rows, None


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], *stacks: Tensor) -> Tensor:
        assert sum(counts) == rows.shape[0], f"{sum(counts)} rows counted, {rows.shape[0]} there"
        if any(ctx.needs_input_grad[2:]):
            ctx.save_for_backward(rows)
        ctx.stacks, ctx.segments, ctx.queue = stacks, segments_of(counts, stacks), queue_here()
        out = rows.new_empty(rows.shape[0], stacks[0].shape[1])
        for weight, segments in zip(stacks, ctx.segments, strict=True):
            for expert, begin, end in segments:
                torch.mm(rows[begin:end], weight[expert].t(), out=out[begin:end])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, grad = ctx.saved_tensors, grads[0].contiguous()  # under checkpointing they can be read once
        rows: Any = saved[0] if saved else None
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = grad.new_empty(grad.shape[0], ctx.stacks[0].shape[2])
        grad_weights: list[Tensor | None] = []
        for weight, segments, needed in zip(ctx.stacks, ctx.segments, ctx.needs_input_grad[2:], strict=True):
            if grad_rows is not None:
                for expert, begin, end in segments:
                    torch.mm(grad[begin:end], weight[expert], out=grad_rows[begin:end])
            made = None
            if needed and hasattr(weight, "main_grad"):
                now_or_later(ctx.queue, partial(_add_expert_gradients, weight, segments, grad, rows))
            elif needed:
                made = torch.zeros_like(weight)
                for expert, begin, end in segments:
                    torch.mm(grad[begin:end].t(), rows[begin:end], out=made[expert])
            grad_weights.append(made)
        return grad_rows, None, *grad_weights


Segments = list[tuple[int, int, int]]  # expert of a stack, first row, end row


def _add_expert_gradients(weight: Tensor, segments: Segments, grad: Tensor, rows: Tensor) -> None:
    for expert, begin, end in segments:
        add_weight_gradient(weight, expert, grad[begin:end], rows[begin:end])


def segments_of(counts: Sequence[int], stacks: Sequence[Tensor]) -> list[Segments]:
    """The experts of each stack that have rows; rows and counts run through the stacks in turn."""
    assert len(counts) == sum(map(len, stacks)), f"{len(counts)} counts for {sum(map(len, stacks))} experts"
    ends = list(accumulate(counts, initial=0))
    spans, found = iter(pairwise(ends)), []
    for weight in stacks:
        own = enumerate(islice(spans, len(weight)))
        found.append([(expert, begin, end) for expert, (begin, end) in own if begin < end])
    return found


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [..., I] times a weight [O, I], transposed: [..., O]."""
    return _Product.apply(rows, weight)


def by_outputs(group: Group, *, sections: int = 1) -> Cut:
    """Cut a weight so that each rank makes a part of the outputs, or of each of so many sections of them."""
    return Cut(dim=0, index=group_rank(group), count=group_size(group), sections=sections)


def by_inputs(group: Group) -> Cut:
    """Cut a weight so that each rank takes a part of the inputs; its outputs are parts of a sum."""
    return Cut(dim=1, index=group_rank(group), count=group_size(group))


WHOLE = Cut(dim=0, index=0, count=1)


def _part_shape(num_outputs: int, num_inputs: int, cut: Cut) -> tuple[int, int]:
    shape = [num_outputs, num_inputs]
    assert shape[cut.dim] % (cut.count * cut.sections) == 0, f"{shape} cannot be cut as {cut}"
    shape[cut.dim] //= cut.count
    return shape[0], shape[1]


def grouped_linear(rows: Tensor, counts: Sequence[int], *stacks: Tensor) -> Tensor:
    """Rows [N, I] in expert order, `counts[i]` for expert i of the stacks [e, O, I] in turn -> [N, O]."""
    return _GroupedProduct.apply(rows, counts, *stacks)


class Products(Protocol):
    """Who makes a layer's products instead of the two functions above, under the same rules (fp8.py)."""

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """As `linear`."""
        ...

    def grouped_linear(self, rows: Tensor, counts: Sequence[int], *stacks: Tensor) -> Tensor:
        """As `grouped_linear`."""
        ...


class Linear(nn.Module):
    """A weight [O, I] without bias, or this rank's part of it."""

    def __init__(
        self, num_inputs: int, num_outputs: int, dtype: torch.dtype = torch.float32, cut: Cut = WHOLE
    ) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs, self.cut = num_inputs, num_outputs, cut  # of the whole weight
        self.weight = nn.Parameter(torch.empty(_part_shape(num_outputs, num_inputs, cut), dtype=dtype))
        mark_cut(self.weight, cut)
        self.lora: nn.Module | None = None
        self.fp8: Products | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        out = (self.fp8.linear if self.fp8 else linear)(rows, self.weight)
        return out if self.lora is None else out + self.lora(rows)


class GroupedLinear(nn.Module):
    """The weights [e, O, I] of this rank's experts, in the order of their numbers `experts`.

    The last `num_chosen` may lie in a stack of their own, `chosen`, so that they alone are trained: only
    that stack then has gradients and optimizer state. Canonical names are the same in either.
    """

    chosen: nn.Parameter | None

    def __init__(
        self,
        experts: Sequence[int],
        num_inputs: int,
        num_outputs: int,
        dtype: torch.dtype = torch.float32,
        cut: Cut = WHOLE,
        *,
        num_chosen: int = 0,
    ) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs, self.cut = num_inputs, num_outputs, cut  # of whole experts
        self.experts = tuple(experts)
        shape, rest = _part_shape(num_outputs, num_inputs, cut), len(experts) - num_chosen
        self.weight = nn.Parameter(torch.empty(rest, *shape, dtype=dtype))
        chosen = nn.Parameter(torch.empty(num_chosen, *shape, dtype=dtype)) if num_chosen else None
        self.register_parameter("chosen", chosen)
        self._mark()
        self.lora: nn.Module | None = None
        self.fp8: Products | None = None

    def _mark(self) -> None:
        rest = len(self.weight)
        mark_experts(self.weight, self.experts[:rest])
        mark_cut(self.weight, self.cut)
        if self.chosen is not None:
            mark_experts(self.chosen, self.experts[rest:], called="weight")
            mark_cut(self.chosen, self.cut)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied parameter has lost its marks, without which its gradient would be reduced as dense."""
        super().__setstate__(state)
        self._mark()

    @property
    def stacks(self) -> tuple[nn.Parameter, ...]:
        """The experts' weights in the order of their rows, in one stack or two."""
        return (self.weight,) if self.chosen is None else (self.weight, self.chosen)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows [N, I] in expert order, `counts[i]` of them for local expert i, -> [N, O]."""
        out = (self.fp8.grouped_linear if self.fp8 else grouped_linear)(rows, counts, *self.stacks)
        return out if self.lora is None else out + self.lora(rows, counts)
