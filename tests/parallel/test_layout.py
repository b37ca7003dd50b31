"""Degrees, divisibility and where a rank stands."""

import pytest

from parallel.errors import UserError
from parallel.layout import Layout, alternatives, divisors


@pytest.mark.parametrize(("dp", "ep", "expert_dp"), [(1, 1, 1), (4, 1, 4), (4, 2, 2), (4, 4, 1), (6, 3, 2)])
def test_degrees(dp: int, ep: int, expert_dp: int) -> None:
    layout = Layout(dp=dp, ep=ep)
    assert (layout.world_size, layout.expert_dp) == (dp, expert_dp)
    places = [layout.coordinates(rank) for rank in range(dp)]
    assert [place["dp"] for place in places] == list(range(dp))
    pairs = [(place["expert_dp"], place["ep"]) for place in places]
    assert pairs == [(copy, part) for copy in range(expert_dp) for part in range(ep)]  # EP varies fastest


@pytest.mark.parametrize(
    ("dp", "ep", "sentence"),
    [
        (0, 1, "`layout.dp` must be at least 1, but is 0: use 1 or more"),
        (2, 0, "`layout.ep` must be at least 1, but is 0: use 1 or more"),
        (6, 4, "`layout.ep` must divide `layout.dp`, but 4 does not divide 6: use 2, 3 or 6"),
    ],
)
def test_wrong_degrees(dp: int, ep: int, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Layout(dp=dp, ep=ep)
    assert str(caught.value) == sentence


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


@pytest.mark.parametrize(("number", "wrong", "words"), [(60, 8, "5, 6 or 10"), (7, 2, "1 or 7"), (1, 5, "1")])
def test_alternatives_are_the_nearest_divisors(number: int, wrong: int, words: str) -> None:
    assert alternatives(number, wrong) == words
