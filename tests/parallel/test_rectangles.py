"""Rectangles: what two share is where both are, and only an exact cover of a tensor is one."""

import random

import torch
from torch import Tensor

from parallel.rectangles import Rectangle, tile
from tests.tilings import tiling


def whole(shape: tuple[int, ...]) -> Rectangle:
    return Rectangle((0,) * len(shape), shape)


def count(shape: tuple[int, ...], rectangles: list[Rectangle]) -> Tensor:
    """How many of the rectangles hold each element."""
    counted = torch.zeros(shape, dtype=torch.int64)
    for rectangle in rectangles:
        counted[rectangle.inside(whole(shape))] += 1
    return counted


def test_common_elements() -> None:
    rng = random.Random(0)
    shape, found = (4, 5, 3), set()
    numbers = torch.arange(60).view(shape)
    for _ in range(200):
        a, b = (rng.choice(tiling(rng, shape)) for _ in range(2))
        of_a, of_b = (numbers[each.inside(whole(shape))] for each in (a, b))
        shared = numbers[count(shape, [a, b]) == 2].tolist()
        if common := a.common(b):
            assert of_a[common.inside(a)].flatten().tolist() == shared
            assert of_b[common.inside(b)].flatten().tolist() == shared
        found.add((common is None, not shared))
    assert found == {(True, True), (False, False)}


def test_a_scalar_is_one_element() -> None:
    scalar = Rectangle((), ())
    assert scalar.common(scalar) == scalar and scalar.inside(scalar) == ()
    assert [tile([scalar] * times, ()) for times in range(4)] == [False, True, False, False]


def test_empty_rectangles_hold_nothing() -> None:
    empty = Rectangle((1,), (0,))
    assert empty.common(Rectangle((0,), (2,))) is None
    assert tile([Rectangle((0,), (2,)), empty], (2,)) and not tile([empty], (2,))
    assert tile([], (3, 0)) and tile([whole((3, 0))], (3, 0)) and not tile([whole((3, 1))], (3, 0))


def test_only_exact_covers_tile() -> None:
    """As counting every element says, for covers and for what is left when they are spoilt."""
    rng = random.Random(1)
    answers = []
    for _ in range(400):
        shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
        rectangles = tiling(rng, shape)
        for _ in range(rng.randint(0, 2)):
            spoilt = rectangles.pop(rng.randrange(len(rectangles)))
            room = [n - extent for n, extent in zip(shape, spoilt.extent, strict=True)]
            moved = Rectangle(tuple(rng.randint(0, n) for n in room), spoilt.extent)
            rectangles += rng.choice([[], [moved], [spoilt, moved]])
            if not rectangles:
                break
        exact = bool((count(shape, rectangles) == 1).all())
        assert tile(rectangles, shape) == exact
        answers.append(exact)
    assert 100 < sum(answers) < 300


def test_what_sticks_out_does_not_tile() -> None:
    assert not tile([Rectangle((0,), (3,))], (2,))
    assert not tile([Rectangle((1,), (2,))], (2,))
    assert not tile([Rectangle((0,), (1,)), Rectangle((2,), (1,))], (2,))
