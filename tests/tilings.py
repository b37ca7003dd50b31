"""Random ways to cut a tensor into rectangles."""

import random

from parallel.rectangles import Rectangle


def tiling(rng: random.Random, shape: tuple[int, ...], cuts: int = 5) -> list[Rectangle]:
    """Rectangles that hold every element of a tensor once, from up to `cuts` random cuts."""
    rectangles = [Rectangle((0,) * len(shape), shape)]
    for _ in range(rng.randint(0, cuts)):
        chosen = rng.randrange(len(rectangles))
        whole = rectangles[chosen]
        dims = [dim for dim, n in enumerate(whole.extent) if n > 1]
        if not dims:
            continue
        dim = rng.choice(dims)
        at = rng.randint(1, whole.extent[dim] - 1)
        rectangles[chosen : chosen + 1] = [
            _stretch(whole, dim, 0, at),
            _stretch(whole, dim, at, whole.extent[dim]),
        ]
    return rectangles


def _stretch(whole: Rectangle, dim: int, begin: int, end: int) -> Rectangle:
    offset, extent = list(whole.offset), list(whole.extent)
    offset[dim], extent[dim] = offset[dim] + begin, end - begin
    return Rectangle(tuple(offset), tuple(extent))
