"""Timelines in characters: what is seen on a terminal, letter by letter."""

from parallel.pipeline.action import parse
from parallel.pipeline.schedules import make
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.text import LEGEND, sketch
from parallel.pipeline.timeline import Span, Timeline


def drawn(name: str, ranks: int, microbatches: int, **costs: float) -> list[str]:
    schedule = make(name, ranks, microbatches)
    mine = Costs(**costs)
    return sketch(simulate(schedule, mine.price(schedule), mine.p2p)).splitlines()


def test_small_cases() -> None:
    assert drawn("1f1b", 2, 3) == ["rank 0  FF..BBFBB.BB", "rank 1  .FBBFBBFBB..", LEGEND]
    assert drawn("zb-h1", 2, 2) == ["rank 0  FF.BWBW", "rank 1  .FBFBWW", LEGEND]
    assert drawn("1f1b-overlap", 1, 2) == ["rank 0  F&&&BB", LEGEND]
    assert drawn("dualpipe", 2, 4) == [
        "rank 0  FfFbb&&&bbBW",
        "rank 1  fFfBB&&&BBbw",
        f"{LEGEND}, in lower case on a rank's later stages",
    ]


def test_only_the_wire_is_busy() -> None:
    assert drawn("1f1b", 1, 1, a2a=1)[0] == "rank 0  F~BB~"
    assert drawn("1f1b", 2, 1, p2p=1)[:2] == ["rank 0  F.....BB", "rank 1  ..FBB..."]  # on its way, not busy


def test_a_measured_timeline_begins_anywhere_and_fits() -> None:
    schedule = parse("mine: 1 microbatches\nrank 0, stages 0: F0 B0")
    spans = [
        Span(slot, 7 + begin, 7 + end)
        for slot, begin, end in zip(schedule.slots[0], (0, 0.3), (0.1, 0.5), strict=True)
    ]
    assert sketch(Timeline(schedule, (tuple(spans),))).splitlines()[0] == "rank 0  F..BB"
    spans[0] = Span(spans[0].slot, 7, 7.0001)  # so short a column that there would be thousands
    assert sketch(Timeline(schedule, (tuple(spans),)), 10).splitlines()[0] == "rank 0  ......BBBB"


def test_ranks_stand_one_below_the_other() -> None:
    lines = drawn("gpipe", 11, 1)[:11]
    assert lines[0].startswith("rank  0  F") and lines[10].startswith("rank 10  .")
    assert len({len(line) for line in lines}) == 1


def test_nothing_to_draw() -> None:
    assert drawn("gpipe", 1, 0) == ["rank 0  ", LEGEND]
