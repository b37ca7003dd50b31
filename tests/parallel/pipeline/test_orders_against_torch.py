"""Our orders against those of `torch.distributed.pipelining`: the same, slot by slot, peak by peak.

Their tables are read without running anything; test_against_torch.py runs both. Simulated in units of a
stage's forward, which takes as long as its input gradients and as its weight gradients. With two stages
on each rank that unit is half of what it is with one.
"""

from dataclasses import replace

import pytest
from torch.distributed.pipelining import Schedule1F1B

from parallel.pipeline.action import Schedule
from parallel.pipeline.check import check, peak_in_flight
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Timeline
from parallel.pipeline.zb_h1 import zb_h1
from tests.parallel.pipeline.torch_orders import converted, stand_in, torch_order

UNIT = Costs(f=1.0, b=2.0, w=1.0)
RANKS = [2, 4, 8]


def replayed(schedule: Schedule, costs: Costs = UNIT) -> Timeline:
    return simulate(schedule, costs.price(schedule))


@pytest.mark.parametrize("ranks", range(1, 9))
def test_dualpipev_is_theirs_slot_by_slot(ranks: int) -> None:
    """Pairs, and which weight gradients are apart, included: no rank deviates."""
    for microbatches in (2 * ranks, 2 * ranks + 1, 4 * ranks, 20):
        assert dualpipev(ranks, microbatches) == torch_order("dualpipev", ranks, microbatches)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_dualpipe_is_two_of_theirs_face_to_face(ranks: int) -> None:
    """On both ends of twice the ranks: what comes back in theirs has come from the other end in ours."""
    for count in (2 * ranks, 2 * ranks + 1, 4 * ranks):
        whole, theirs = dualpipe(2 * ranks, 2 * count), torch_order("dualpipev", ranks, count)
        for rank, slots in enumerate(theirs.slots):
            for at, near, far in ((rank, 0, count), (2 * ranks - 1 - rank, count, 0)):
                first = {theirs.stages[rank][0]: near, theirs.stages[rank][1]: far}
                assert whole.slots[at] == tuple(
                    tuple(replace(a, microbatch=first[a.stage] + a.microbatch) for a in slot)
                    for slot in slots
                )


@pytest.mark.parametrize("ranks", range(1, 9))
def test_interleaved_is_theirs(ranks: int) -> None:
    """Theirs also takes other numbers of microbatches, in longer rounds; ours only multiples of the ranks."""
    for rounds in (1, 2, 5):
        ours = interleaved(ranks, rounds * ranks, 2)
        assert ours == torch_order("interleaved", ranks, rounds * ranks)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 8), (3, 3), (4, 8), (8, 20)])
def test_1f1b_is_theirs(ranks: int, microbatches: int) -> None:
    """Their table counts the last rank's forwards from 1, up to one that does not exist.

    What they run there begins with 0, as ours does (test_against_torch.py).
    """
    table = Schedule1F1B(stand_in(ranks, ranks), microbatches).pipeline_order
    assert table is not None
    theirs, ours = converted("1f1b", microbatches, table), one_f_one_b(ranks, microbatches)
    assert ours.slots[:-1] == theirs.slots[:-1]
    shifted = {f"F{number}": f"F{number + 1}" for number in range(microbatches)}
    assert [shifted.get(word, word) for word in ours.words(ranks - 1)] == theirs.words(ranks - 1)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "makespan"), [(2, 8, 50), (4, 8, 54), (4, 20, 126), (8, 20, 134)]
)
def test_makespans_of_dualpipev(ranks: int, microbatches: int, makespan: int) -> None:
    for schedule in (dualpipev(ranks, microbatches), torch_order("dualpipev", ranks, microbatches)):
        assert replayed(schedule).makespan == makespan
        assert peak_in_flight(schedule) == (2 * ranks + 1,) * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_bubbles_and_peaks_of_all(ranks: int) -> None:
    """Theirs that we do not have are lawful too: with ZBV's a rank waits half as long as with ours.

    Not counted here is what pairs gain: DualPipeV's hide their all-to-all, ZBV has none.
    """
    count, whole_stage = 3 * ranks, Costs(f=2.0, b=4.0, w=2.0)
    expected = [  # in half stages: the bubble of every rank, and each rank's peak
        (torch_order("zbv", ranks, count), UNIT, ranks - 1, [2 * ranks] * ranks),
        (torch_order("interleaved-zb", ranks, count), UNIT, ranks - 1, [2 * ranks] * ranks),
        (dualpipev(ranks, count), UNIT, 2 * (ranks - 1), [2 * ranks + 1] * ranks),
        (zb_h1(ranks, count), whole_stage, 2 * (ranks - 1), [2 * ranks] * ranks),
        (interleaved(ranks, count, 2), UNIT, 3 * (ranks - 1), [3 * ranks - 1 - 2 * r for r in range(ranks)]),
        (one_f_one_b(ranks, count), whole_stage, 6 * (ranks - 1), [2 * (ranks - r) for r in range(ranks)]),
    ]
    for schedule, costs, bubble, peaks in expected:
        check(schedule)
        assert replayed(schedule, costs).bubbles == (bubble,) * ranks, schedule.name
        each = 1 if costs is UNIT else 2
        assert [each * peak for peak in peak_in_flight(schedule)] == peaks, schedule.name
