"""Rectangles within tensors: what two of them share, and whether many tile a tensor. No torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Rectangle:
    """The elements `offset` .. `offset + extent - 1` of a tensor, in every dimension; () for a scalar."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    def common(self, other: "Rectangle") -> "Rectangle | None":
        """The elements that lie in both; None where there are none."""
        offset = tuple(map(max, self.offset, other.offset))
        end = tuple(map(min, self._end, other._end))
        extent = tuple(e - o for o, e in zip(offset, end, strict=True))
        return None if any(n <= 0 for n in extent) else Rectangle(offset, extent)

    def inside(self, outer: "Rectangle") -> tuple[slice, ...]:
        """Where this rectangle lies in a tensor that holds `outer`, to index it with."""
        begin = tuple(o - first for o, first in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(b, b + n) for b, n in zip(begin, self.extent, strict=True))

    def corners(self) -> set[tuple[int, ...]]:
        """The 2^dims corners; none of an empty rectangle."""
        return set(product(*zip(self.offset, self._end, strict=True))) if math.prod(self.extent) else set()

    @property
    def _end(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offset, self.extent, strict=True))


def tile(rectangles: Collection[Rectangle], shape: tuple[int, ...]) -> bool:
    """Whether rectangles hold every element of a tensor, and nothing else, exactly once.

    Corners met twice cancel. Where those of the tensor are left, every element of it lies in an odd
    number of rectangles and every other in an even one; with as many elements in all, in one and in none.
    """
    corners: set[tuple[int, ...]] = set()
    for rectangle in rectangles:
        corners ^= rectangle.corners()
    whole = Rectangle((0,) * len(shape), shape)
    return corners == whole.corners() and sum(math.prod(r.extent) for r in rectangles) == math.prod(shape)
