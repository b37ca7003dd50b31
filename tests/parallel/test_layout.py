"""Degrees, divisibility, and where a rank stands in both grids."""

from typing import Any

import pytest

from parallel.errors import UserError
from parallel.layout import Layout, alternatives, divisors, length_multiple


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(dp=4, ep=2),
        Layout(tp=2, pp=2, dp=2, ep=2),
        Layout(tp=2, cp=2, dp=2, ep=4, etp=2),
        Layout(tp=2, dp=3, pp=2, ep=3, etp=1),
        Layout(tp=4, dp=2, ep=8),
    ],
    ids=Layout.describe,
)
def test_every_rank_has_its_own_place_in_both_grids(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for axes in (("tp", "cp", "dp", "pp"), ("etp", "ep", "expert_dp", "pp")):
        assert len({tuple(place[axis] for axis in axes) for place in places}) == layout.world_size
        for axis in axes:
            assert {place[axis] for place in places} == set(range(getattr(layout, axis)))
    assert layout.world_size == layout.stage_size * layout.pp
    assert layout.stage_size == layout.expert_dp * layout.ep * layout.etp


def test_the_first_axis_varies_fastest_and_the_stage_slowest() -> None:
    layout = Layout(tp=2, cp=2, dp=2, pp=2, ep=4, etp=2)
    assert [layout.coordinates(rank)["tp"] for rank in range(4)] == [0, 1, 0, 1]
    assert [layout.coordinates(rank)["cp"] for rank in range(4)] == [0, 0, 1, 1]
    assert [layout.coordinates(rank)["ep"] for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [layout.coordinates(rank)["pp"] for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("degrees", "sentence"),
    [
        ({"dp": 0}, "`layout.dp` must be at least 1, but is 0: use 1 or more"),
        ({"dp": 2, "ep": 0}, "`layout.ep` must be at least 1, but is 0: use 1 or more"),
        (
            {"dp": 6, "ep": 4},
            "`layout.ep` must divide `layout.tp` x `layout.cp` x `layout.dp` / `layout.etp`, but 4 does not "
            "divide 6: use 2, 3 or 6",
        ),
        (
            {"tp": 2, "dp": 3, "etp": 4},
            "`layout.etp` must divide `layout.tp` x `layout.cp` x `layout.dp`, but 4 does not divide 6: "
            "use 2, 3 or 6",
        ),
    ],
)
def test_wrong_degrees(degrees: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Layout(**degrees)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("layout", "ranks_per_node", "axes"),
    [
        (Layout(tp=2, dp=8, ep=8), 8, []),
        (Layout(tp=2, dp=8, ep=16), 8, ["ep"]),
        (Layout(tp=4, dp=1), 2, ["tp"]),
        (Layout(tp=3, dp=2), 4, ["tp"]),  # ranks 3, 4 and 5 lie on two nodes
        (Layout(dp=8, ep=2, etp=4), 4, ["ep"]),
        (Layout(dp=16, pp=2), 8, []),
    ],
    ids=str,
)
def test_groups_that_leave_their_node_are_named(layout: Layout, ranks_per_node: int, axes: list[str]) -> None:
    sentences = list(layout.across_nodes(ranks_per_node))
    assert [sentence.split("`")[1] for sentence in sentences] == [f"layout.{axis}" for axis in axes]
    if axes == ["tp"]:
        assert "over 2 nodes" in sentences[0]


def test_lengths() -> None:
    assert [length_multiple(cp, tp) for cp, tp in ((1, 1), (1, 4), (2, 1), (4, 2))] == [1, 4, 4, 16]


def test_describe() -> None:
    assert Layout().describe() == "one rank"
    assert Layout(tp=2, pp=2, ep=2).describe() == "tp2·pp2·ep2"


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


@pytest.mark.parametrize(("number", "wrong", "words"), [(60, 8, "5, 6 or 10"), (7, 2, "1 or 7"), (1, 5, "1")])
def test_alternatives_are_the_nearest_divisors(number: int, wrong: int, words: str) -> None:
    assert alternatives(number, wrong) == words
