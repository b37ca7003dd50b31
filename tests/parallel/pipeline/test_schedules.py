"""The generated schedules: lawful, with the peaks that they promise, and pairs that keep every rank busy."""

from itertools import pairwise

import pytest

from parallel.pipeline.action import Action, Schedule
from parallel.pipeline.check import check, peak_in_flight
from parallel.pipeline.gpipe import forward_only, gpipe
from parallel.pipeline.one_f_one_b import one_f_one_b

SIZES = [(ranks, microbatches) for ranks in (1, 2, 3, 4, 7) for microbatches in (0, 1, 2, 3, 4, 5, 8, 17)]


def words(schedule: Schedule, rank: int) -> str:
    return str(schedule).splitlines()[1 + rank].split(": ")[1]


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_every_schedule_is_lawful(ranks: int, microbatches: int) -> None:
    for schedule in (
        gpipe(ranks, microbatches),
        forward_only(ranks, microbatches),
        one_f_one_b(ranks, microbatches),
        one_f_one_b(ranks, microbatches, overlap=True),
    ):
        check(schedule)
        assert schedule.num_ranks == ranks and schedule.num_microbatches == microbatches


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_peaks(ranks: int, microbatches: int) -> None:
    after = [ranks - rank for rank in range(ranks)]
    assert peak_in_flight(gpipe(ranks, microbatches)) == (microbatches,) * ranks
    assert peak_in_flight(one_f_one_b(ranks, microbatches)) == tuple(min(n, microbatches) for n in after)
    overlapped = peak_in_flight(one_f_one_b(ranks, microbatches, overlap=True))
    assert overlapped == tuple(min(2 * n, microbatches) for n in after)


def test_orders() -> None:
    assert words(gpipe(2, 2), 0) == words(gpipe(2, 2), 1) == "F0 F1 B0 B1"
    assert words(forward_only(2, 3), 1) == "F0 F1 F2"
    assert words(one_f_one_b(1, 2), 0) == "F0 B0 F1 B1"
    assert words(one_f_one_b(3, 4), 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert words(one_f_one_b(1, 4, overlap=True), 0) == "F0 F1&B0 F2&B1 F3&B2 B3"
    assert words(one_f_one_b(2, 4, overlap=True), 0) == "F0 F1 F2 F3&B0 B1 B2 B3"


def spans(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """(begin, end) of every slot of every rank, a forward taking 1, a backward 2 and a pair 3."""
    ends: dict[Action, int] = {}
    found: list[list[tuple[int, int]]] = [[] for _ in schedule.slots]
    while any(len(mine) < len(slots) for mine, slots in zip(found, schedule.slots, strict=True)):
        for mine, slots in zip(found, schedule.slots, strict=True):
            if len(mine) < len(slots):
                slot = slots[len(mine)]
                sources = [source for action in slot if (source := schedule.source(action))]
                if all(source in ends for source in sources):
                    begin = max([mine[-1][1] if mine else 0, *(ends[source] for source in sources)])
                    end = begin + sum(1 if action.kind == "F" else 2 for action in slot)
                    mine.append((begin, end))
                    ends |= dict.fromkeys(slot, end)
    return found


def test_no_rank_stands_still_between_its_pairs() -> None:
    schedule = one_f_one_b(4, 20, overlap=True)
    for mine, slots in zip(spans(schedule), schedule.slots, strict=True):
        pairs = [span for span, slot in zip(mine, slots, strict=True) if len(slot) == 2]
        assert len(pairs) >= 13
        assert all(before[1] == after[0] for before, after in pairwise(pairs))


def test_the_bubble_of_1f1b() -> None:
    """(P - 1) (F + B)."""
    first = spans(one_f_one_b(4, 8))[0]
    assert first[-1][1] == (8 + 3) * (1 + 2)
