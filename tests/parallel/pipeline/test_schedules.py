"""The generated schedules: lawful, in the published order, with the peaks and bubbles that they promise.

Simulated here with F = 1, input gradient = 1, weight gradient = 1 and a pair as long as its parts; the
closed forms are those of the DualPipe repository, in which B is the whole backward and W its part.
"""

from itertools import pairwise

import pytest

from parallel.pipeline.action import Schedule
from parallel.pipeline.check import check, peak_in_flight
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.gpipe import forward_only, gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Timeline
from parallel.pipeline.zb_h1 import zb_h1
from tests.parallel.pipeline.every import schedules

SIZES = [
    (ranks, microbatches) for ranks in (1, 2, 3, 4, 7, 8) for microbatches in (0, 1, 2, 3, 4, 5, 8, 17, 20)
]
RANKS = [2, 4, 6, 8, 16, 32, 64]
COSTS = [Costs(), Costs(f=1.0, b=1.7, w=0.7), Costs(f=2.0, b=3.0, w=1.0)]


def words(schedule: Schedule, rank: int) -> str:
    return " ".join(schedule.words(rank))


def replayed(schedule: Schedule, costs: Costs = COSTS[0]) -> Timeline:
    return simulate(schedule, costs.price(schedule))


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_every_schedule_is_lawful(ranks: int, microbatches: int) -> None:
    for schedule in (
        *schedules(ranks, microbatches),
        forward_only([(rank,) for rank in range(ranks)], microbatches),
        forward_only([(rank, 2 * ranks - 1 - rank) for rank in range(ranks)], microbatches),
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
    assert peak_in_flight(zb_h1(ranks, microbatches)) == (min(ranks, microbatches),) * ranks


def test_orders() -> None:
    assert words(gpipe(2, 2), 0) == words(gpipe(2, 2), 1) == "F0 F1 B0 B1"
    assert words(forward_only([(0,), (1,)], 3), 1) == "F0 F1 F2"
    assert words(forward_only([(0, 3), (1, 2)], 2), 0) == "F0 F1 F0' F1'"
    assert words(one_f_one_b(1, 2), 0) == "F0 B0 F1 B1"
    assert words(one_f_one_b(3, 4), 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert words(one_f_one_b(1, 4, overlap=True), 0) == "F0 F1&B0 F2&B1 F3&B2 B3"
    assert words(one_f_one_b(2, 4, overlap=True), 0) == "F0 F1 F2 F3&B0 B1 B2 B3"
    assert words(zb_h1(2, 3), 0) == "F0 F1 B0 W0 F2 B1 W1 B2 W2"
    assert words(zb_h1(2, 3), 1) == "F0 B0 F1 B1 W0 F2 B2 W1 W2"
    assert words(interleaved(2, 2, 2), 0) == "F0 F1 F0' F1' B0' B1' B0 B1"
    assert words(interleaved(2, 2, 2), 1) == "F0 F1 F0' B0' F1' B1' B0 B1"


def test_the_order_of_dualpipe() -> None:
    """4 ranks, 8 microbatches; the lower half of the ranks mirrors the upper one."""
    steps = [
        *("F0 F1", "F2 F4'", "B4' W4' F5'", "F3&B5' F6'&B0", "B6' F7'&B1", "B7' B2"),
        *("W2 B3", "W3"),
    ]
    assert words(dualpipe(4, 8), 0) == " ".join(steps)
    assert words(dualpipe(4, 8), 1) == ("F0 F4' F1 F5' F2 B4' F6'&B0 F3&B5' F7'&B1 B6' B2 B7' B3 W7' W3")
    swapped = {"0": "4", "1": "5", "2": "6", "3": "7", "4": "0", "5": "1", "6": "2", "7": "3"}
    for rank in (0, 1):
        mirrored = dualpipe(4, 8).slots[3 - rank]
        for slot, mirror in zip(dualpipe(4, 8).slots[rank], mirrored, strict=True):
            assert [(a.kind, a.stage, int(swapped[str(a.microbatch)])) for a in slot] == [
                (a.kind, a.stage, a.microbatch) for a in mirror
            ]
    assert dualpipe(4, 8).stages == ((0, 3), (1, 2), (2, 1), (3, 0))


def test_dualpipev_is_the_upper_half_of_a_dualpipe_twice_as_long() -> None:
    """Stages and order are those of ranks 0 .. P - 1 of 2P; only each microbatch passes both directions."""
    whole, half = dualpipe(8, 32), dualpipev(4, 16)
    assert half.stages == whole.stages[:4]
    for rank in range(4):
        folded = [
            [(action.kind, action.microbatch % 16, action.stage) for action in slot]
            for slot in whole.slots[rank]
        ]
        assert folded == [[(a.kind, a.microbatch, a.stage) for a in slot] for slot in half.slots[rank]]


@pytest.mark.parametrize(
    ("ranks", "costs"), [(ranks, costs) for ranks in RANKS for costs in COSTS[: 1 if ranks > 16 else 3]]
)
def test_bubbles_are_the_closed_forms(ranks: int, costs: Costs) -> None:
    """On every rank. DualPipe's is exact where a forward takes as long as the input gradients."""
    f, b, w = costs.f, costs.b, costs.w
    both, count = f + b, 2 * ranks + 2
    expected = [
        (one_f_one_b(ranks, count), (ranks - 1) * (f + b)),
        (gpipe(ranks, count), (ranks - 1) * (f + b)),
        (interleaved(ranks, 2 * ranks, 2), (ranks - 1) * (f + b)),
        (zb_h1(ranks, count), (ranks - 1) * (f + b - 2 * w)),
    ]
    if f == b - w:
        expected += [
            (dualpipe(ranks, count), (ranks / 2 - 1) * (both + b - 3 * w)),
            (dualpipev(ranks, count), (ranks - 1) * (both + b - 3 * w)),
        ]
    for schedule, bubble in expected:
        assert replayed(schedule, costs).bubbles == pytest.approx((bubble,) * ranks, abs=1e-6), schedule.name


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipe_holds_one_more_microbatch_than_ranks(ranks: int) -> None:
    """P - r of the direction that enters at this end and r + 1 of the other one, P + 1 in all."""
    schedule = dualpipe(ranks, 2 * ranks + 2)
    assert peak_in_flight(schedule) == (ranks + 1,) * ranks
    for rank in range(ranks):
        assert peak_by_stage(schedule, rank) == {rank: ranks - rank, ranks - 1 - rank: rank + 1}
    folded = dualpipev(ranks, 2 * ranks)
    assert peak_in_flight(folded) == (2 * ranks + 1,) * ranks
    for rank in range(ranks):
        assert peak_by_stage(folded, rank) == {rank: 2 * ranks - rank, 2 * ranks - 1 - rank: rank + 1}


def peak_by_stage(schedule: Schedule, rank: int) -> dict[int, int]:
    held, peaks = dict.fromkeys(schedule.stages[rank], 0), dict.fromkeys(schedule.stages[rank], 0)
    for slot in schedule.slots[rank]:
        for action in slot:
            held[action.stage] += (action.kind == "F") - schedule.is_last(action)
            peaks[action.stage] = max(peaks[action.stage], held[action.stage])
    return peaks


@pytest.mark.parametrize(
    ("ranks", "microbatches", "makespan"), [(2, 8, 24), (4, 8, 26), (4, 20, 62), (8, 20, 66)]
)
def test_makespans_recorded_from_deepseeks_own_class(ranks: int, microbatches: int, makespan: int) -> None:
    assert replayed(dualpipe(ranks, microbatches)).makespan == makespan


def test_no_rank_stands_still_between_its_pairs() -> None:
    for mine in replayed(one_f_one_b(4, 20, overlap=True)).spans:
        pairs = [span for span in mine if len(span.slot) == 2]
        assert len(pairs) >= 13
        assert all(before.end == after.begin for before, after in pairwise(pairs))
