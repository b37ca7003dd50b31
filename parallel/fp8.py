"""Products in FP8: E4M3 numbers with an fp32 factor for each block, as DeepSeek-V3 trains (2412.19437, 3.3).

Activations and gradients have a factor for 1 x 128 numbers, weights for 128 x 128. The weight gradient sums
over rows, so both its factors lie along them: 128 x 1, and each expert's rows begin a block anew. A block
that is cut by the end of a tensor, a rank or an expert is shorter; no number of another part decides its
factor. The factor is 448 / amax, so that a block's greatest number is E4M3's greatest.

A `Backend` makes the products; `Products` turns it into what layers call, under the rules of linear.py for
buffers of gradients and for the queue in which their making waits. `Emulated` is a backend for any device:
every number is rounded as an FP8 unit gets it, then the product is made in fp32. What it does not show is
the shorter accumulator of Hopper's units. A weight is quantised at each use: a shared version counter that
would tell of its change does not exist, as the optimizer writes a buffer that weights are views of (zero.py).
Legend: N rows, I inputs, O outputs, e experts of this rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.linear import now_or_later, queue_here

BLOCK = 128
E4M3 = torch.float8_e4m3fn
GREATEST = torch.finfo(E4M3).max  # 448


class Backend(Protocol):
    """Who makes the products of e experts; a plain weight is a stack of one.

    `counts[i]` rows of expert i lie together, in order. Results have the dtype of the rows.
    """

    def product(self, rows: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        """Rows [N, I] in 1 x 128, weights [e, O, I] in 128 x 128 -> [N, O]."""
        ...

    def product_back(self, grad: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        """Gradients [N, O] in 1 x 128, weights [e, O, I] in 128 x 128 -> [N, I]."""
        ...

    def keep(self, rows: Tensor, counts: Sequence[int]) -> Any:
        """What the weight gradient needs of rows [N, I]: they in 128 x 1, each expert's by themselves."""
        ...

    def add_weight_gradient(self, target: Tensor, grad: Tensor, kept: Any, counts: Sequence[int]) -> None:
        """Add grad^T rows to the target [e, O, I], gradients [N, O] in 128 x 1 as the rows that were kept."""
        ...


@dataclass(frozen=True)
class Products:
    """What a layer's `fp8` is: products with weights, by a backend."""

    backend: Backend

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [..., I] times a weight [O, I], transposed: [..., O]."""
        flat = rows.flatten(0, -2)
        out: Tensor = _Product.apply(self.backend, flat, (len(flat),), weight)
        return out.unflatten(0, rows.shape[:-1])

    def grouped_linear(self, rows: Tensor, counts: Sequence[int], *stacks: Tensor) -> Tensor:
        """Rows [N, I] in expert order, `counts[i]` for expert i of the stacks [e, O, I] in turn -> [N, O]."""
        held = [stack for stack in stacks if len(stack)]  # all of a rank's experts may be in the other
        return _Product.apply(self.backend, rows, counts, *held)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, rows: Tensor, counts: Sequence[int], *weights: Tensor) -> Tensor:
        assert sum(counts) == rows.shape[0], f"{sum(counts)} rows counted, {rows.shape[0]} there"
        ctx.backend, ctx.weights, ctx.queue = backend, weights, queue_here()
        ctx.counts = list(_counts_by_stack(counts, weights))
        parts = rows.contiguous().split([sum(own) for own in ctx.counts])
        ctx.kept = [
            backend.keep(part, own) if needed else None
            for part, own, needed in zip(parts, ctx.counts, ctx.needs_input_grad[3:], strict=True)
        ]
        made = zip(parts, ctx.counts, weights, strict=True)
        return _joined([backend.product(part, own, _stack(weight)) for part, own, weight in made])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        backend, needed = ctx.backend, ctx.needs_input_grad
        parts = grads[0].contiguous().split([sum(own) for own in ctx.counts])
        grad_rows = None
        if needed[1]:
            made = zip(parts, ctx.counts, ctx.weights, strict=True)
            grad_rows = _joined(
                [backend.product_back(part, own, _stack(weight)) for part, own, weight in made]
            )
        grad_weights: list[Tensor | None] = []
        for place, weight in enumerate(ctx.weights):
            facts = parts[place], ctx.kept[place], ctx.counts[place]
            grad_weight = None
            if needed[3 + place] and hasattr(weight, "main_grad"):
                now_or_later(ctx.queue, partial(_add_to_main_grad, backend, weight, *facts))
            elif needed[3 + place]:
                target = torch.zeros_like(_stack(weight), dtype=torch.float32)
                backend.add_weight_gradient(target, *facts)
                grad_weight = target.view_as(weight).to(weight.dtype)
            grad_weights.append(grad_weight)
        return None, grad_rows, None, *grad_weights


def _add_to_main_grad(
    backend: Backend, weight: Tensor, grad: Tensor, kept: Any, counts: Sequence[int]
) -> None:
    backend.add_weight_gradient(_stack(weight.main_grad), grad, kept, counts)  # type: ignore[attr-defined]


def _stack(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 3 else weight[None]


def _counts_by_stack(counts: Sequence[int], weights: Sequence[Tensor]) -> Iterator[tuple[int, ...]]:
    every = iter(counts)
    for weight in weights:
        yield tuple(islice(every, len(_stack(weight))))
    assert next(every, None) is None, f"{len(counts)} counts for the experts of {len(weights)} stacks"


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class Scaled:
    """Numbers [..., R, C] in E4M3, and by what those of a block are multiplied to be read."""

    values: Tensor  # [..., R, C]
    inverses: Tensor  # [..., ceil(R / block[0]), ceil(C / block[1])], fp32
    block: tuple[int, int]

    def numbers(self) -> Tensor:
        """What they stand for, in fp32."""
        inverses = self.inverses
        for dim, size in ((-2, self.block[0]), (-1, self.block[1])):
            if size > 1:
                inverses = inverses.repeat_interleave(size, dim).narrow(dim, 0, self.values.shape[dim])
        return self.values.float() * inverses


def quantised(numbers: Tensor, block: tuple[int, int]) -> Scaled:
    """Numbers [..., R, C] in blocks of their last two dimensions, the last ones shorter.

    A block of zeros has scale 1. One that holds a NaN or an infinity is NaN throughout: it must not pass
    unseen, and E4M3 has no infinity.
    """
    rows, columns = numbers.shape[-2:]
    padded = F.pad(numbers.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    scales = (GREATEST / amax).clamp(max=torch.finfo(torch.float32).max)  # of the smallest it would overflow
    scales = scales.masked_fill(amax == 0, 1.0)
    values = (blocks * scales).to(E4M3).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return Scaled(values, scales.reciprocal().squeeze((-3, -1)), block)


_ROW, _COLUMN, _SQUARE = (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)


@dataclass(frozen=True)
class Packed:
    """Rows on the wire in FP8, 1 x 128, their factors behind them: a `Packing` of collectives.py.

    As bytes, which every transport knows: of D numbers D + 4 ceil(D / 128). A product that takes up such rows
    quantises them in the same blocks, to the same numbers.
    """

    def pack(self, rows: Tensor) -> Tensor:
        """[N, D] -> [N, D + 4 ceil(D / 128)]."""
        scaled = quantised(rows, _ROW)
        parts = (scaled.values, scaled.inverses)
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """[M, D + 4 ceil(D / 128)] -> [M, D]."""
        width = like.shape[1]
        values = packed[:, :width].view(E4M3)
        inverses = packed[:, width:].clone(memory_format=torch.contiguous_format)  # aligned to its four bytes
        return Scaled(values, inverses.view(torch.float32), _ROW).numbers().to(like.dtype)


@dataclass(frozen=True)
class Emulated:
    """The backend of any device: exact to fp32's rounding, and slower than bf16."""

    def product(self, rows: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        """As `Backend` says."""
        return _by_expert(rows, counts, quantised(weights, _SQUARE).numbers().transpose(1, 2))

    def product_back(self, grad: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        """As `Backend` says."""
        return _by_expert(grad, counts, quantised(weights, _SQUARE).numbers())

    def keep(self, rows: Tensor, counts: Sequence[int]) -> tuple[Scaled, ...]:
        """As `Backend` says: the rows of each expert."""
        return tuple(quantised(part, _COLUMN) for part in rows.split(list(counts)))

    def add_weight_gradient(
        self, target: Tensor, grad: Tensor, kept: tuple[Scaled, ...], counts: Sequence[int]
    ) -> None:
        """As `Backend` says."""
        for expert, (part, rows) in enumerate(zip(grad.split(list(counts)), kept, strict=True)):
            if len(part):
                target[expert] += quantised(part, _COLUMN).numbers().t() @ rows.numbers()


def _by_expert(rows: Tensor, counts: Sequence[int], matrices: Tensor) -> Tensor:
    """Rows [N, a] in 1 x 128, each times the fp32 matrix [a, b] of its expert."""
    parts = quantised(rows, _ROW).numbers().split(list(counts))
    return torch.cat([part @ own for part, own in zip(parts, matrices, strict=True)]).to(rows.dtype)
