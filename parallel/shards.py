"""How each parameter is cut and replicated: what checkpoint, conversion and optimizer need to know.

A parameter may be whole on every rank, cut over the tensor-parallel axis, or a stack [e, ...] of experts
of this rank, each of them cut over the expert-tensor axis. Canonical tensors know none of this: they
are whole, and every expert stands by itself, as `layers.3.moe.experts.17.down.weight`. A `Piece` is
a rectangle of a canonical tensor; what a rank holds of one, whole or flat, is a list of pieces.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """Part `index` of `count` along `dim` of every canonical tensor of a parameter.

    With `sections` the dimension is that many equal stretches, each cut alike (gate rows and up rows).
    """

    dim: int
    index: int
    count: int
    sections: int = 1


@dataclass(frozen=True)
class Piece:
    """A rectangle of a canonical tensor: `tensor` is a view of what this rank holds, shaped like it."""

    name: str
    shape: tuple[int, ...]  # of the whole canonical tensor
    offset: tuple[int, ...]  # of the rectangle within it
    tensor: Tensor

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the rectangle lies, to index the canonical tensor with."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.tensor.shape, strict=True))


def mark_experts(parameter: nn.Parameter, numbers: tuple[int, ...], called: str | None = None) -> None:
    """Record that dim 0 of a parameter runs over these experts, in this order.

    `called`: the last part of the canonical names, where it is not the parameter's own. Experts that lie
    in several stacks have names that do not tell which.
    """
    assert len(numbers) == len(parameter), f"a stack of {len(parameter)} cannot hold experts {numbers}"
    parameter.experts, parameter.called = numbers, called  # type: ignore[attr-defined]


def mark_cut(parameter: nn.Parameter, cut: Cut | None) -> None:
    """Record that a parameter holds a part of its canonical tensors; the stack of experts is not a dim."""
    if cut is not None and cut.count > 1:
        parameter.cut = cut  # type: ignore[attr-defined]


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter is a stack of experts, different on every rank of the expert group."""
    return hasattr(parameter, "experts")


def is_cut(parameter: Tensor) -> bool:
    """Whether a parameter holds a part of its canonical tensors."""
    return hasattr(parameter, "cut")


def pieces(name: str, parameter: Tensor, flat: Tensor, begin: int = 0) -> Iterator[Piece]:
    """Pieces of what a rank holds of a parameter, its gradient or a moment, as views of `flat`.

    `flat` [n] holds the parameter's elements `begin` .. `begin` + n - 1, in the order of its memory.
    """
    end = begin + flat.numel()
    for block in _blocks(name, parameter):
        low, high = max(begin, block.begin), min(end, block.begin + math.prod(block.extent))
        for start, extent in _rectangles(block.extent, low - block.begin, high - block.begin):
            first = block.begin - begin + _flat_index(start, block.extent)
            offset = tuple(o + s for o, s in zip(block.offset, start, strict=True))
            view = flat[first : first + math.prod(extent)].view(extent)
            yield Piece(block.name, block.shape, offset, view)


def parameter_pieces(module: nn.Module) -> Iterator[Piece]:
    """Every parameter of a module as pieces of canonical tensors, views that can be written."""
    for name, parameter in module.named_parameters():
        yield from pieces(name, parameter, parameter.detach().view(-1))


@dataclass(frozen=True)
class _Block:
    """A rectangle of a canonical tensor that lies in one stretch of a parameter's memory."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    begin: int  # where the stretch begins


def _blocks(name: str, parameter: Tensor) -> Iterator[_Block]:
    if not is_expert(parameter):
        yield from _sections(name, tuple(parameter.shape), parameter, 0)
        return
    head, stack, tail = name.rpartition("experts.")
    assert stack, f"{name} is stacked by expert, but its name has no `experts`"
    numbers: tuple[int, ...] = parameter.experts  # type: ignore[attr-defined]
    called: str | None = parameter.called  # type: ignore[attr-defined]
    if called is not None:
        tail = ".".join((*tail.split(".")[:-1], called))
    _, *shape = parameter.shape
    for index, number in enumerate(numbers):
        full_name = f"{head}{stack}{number}.{tail}"
        yield from _sections(full_name, tuple(shape), parameter, index * math.prod(shape))


def _sections(name: str, local: tuple[int, ...], parameter: Tensor, begin: int) -> Iterator[_Block]:
    cut: Cut = getattr(parameter, "cut", Cut(dim=0, index=0, count=1))
    dim = cut.dim
    assert cut.sections == 1 or dim == 0, "sections must lie in one stretch of memory"
    length = local[dim] // cut.sections
    shape = (*local[:dim], local[dim] * cut.count, *local[dim + 1 :])
    extent = (*local[:dim], length, *local[dim + 1 :])
    for section in range(cut.sections):
        offset = [0] * len(local)
        offset[dim] = (section * cut.count + cut.index) * length
        yield _Block(name, shape, tuple(offset), extent, begin + section * math.prod(extent))


def _rectangles(
    extent: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, extent) of the rectangles that make up elements low .. high - 1 of a tensor in memory order."""
    if low >= high:
        return
    if len(extent) == 1:
        yield (low,), (high - low,)
        return
    row = math.prod(extent[1:])
    first, last = -(-low // row), high // row  # whole rows
    if first > last:  # inside one row
        yield from _inside_row(extent, last, low, high)
        return
    yield from _inside_row(extent, first - 1, low, first * row)
    if first < last:
        zeros = (0,) * (len(extent) - 1)
        yield (first, *zeros), (last - first, *extent[1:])
    yield from _inside_row(extent, last, last * row, high)


def _inside_row(
    extent: tuple[int, ...], row: int, low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    size = math.prod(extent[1:])
    for start, inner in _rectangles(extent[1:], low - row * size, high - row * size):
        yield (row, *start), (1, *inner)


def _flat_index(start: tuple[int, ...], extent: tuple[int, ...]) -> int:
    index = 0
    for position, size in zip(start, extent, strict=True):
        index = index * size + position
    return index
