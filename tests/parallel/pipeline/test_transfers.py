"""Sends and receives derived from schedules, and channels that never deadlock though each is serialised."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from itertools import product

import pytest

from parallel.pipeline.action import Action, Schedule, parse
from parallel.pipeline.gpipe import forward_only
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.transfers import Channel, Message, channels, transfers
from tests.parallel.pipeline.every import schedules


def test_sends_and_receives_of_1f1b() -> None:
    schedule = one_f_one_b(2, 3)
    down, up = Channel(0, 1, "F"), Channel(1, 0, "B")
    assert channels(schedule) == [down, up]
    first, last = transfers(schedule, 0), transfers(schedule, 1)
    assert first.sends == {Action("F", i, 0): down for i in range(3)}
    assert last.sends == {Action("B", i, 1): up for i in range(3)}
    # rank 0 runs F0 F1 B0 F2 B1 B2, rank 1 F0 B0 F1 B1 F2 B2: each receive one slot ahead of its use
    assert [[m.result for m in due] for due in first.receives] == [
        [],
        [Action("B", 0, 1)],
        [],
        [Action("B", 1, 1)],
        [Action("B", 2, 1)],
        [],
    ]
    assert [[m.result.microbatch for m in due] for due in last.receives] == [[0], [1], [], [2], [], []]


def test_a_forward_only_schedule_has_no_way_back() -> None:
    assert channels(forward_only([(0,), (1,), (2,)], 2)) == [Channel(0, 1, "F"), Channel(1, 2, "F")]


def test_a_result_that_stays_on_its_rank_is_not_sent() -> None:
    lines = ["rank 0, stages 0 3: F0 F0' B0' B0", "rank 1, stages 1 2: F0 F0' B0' B0"]
    schedule = parse("\n".join(["v: 1 microbatches", *lines]))
    assert channels(schedule) == [Channel(*ends, kind) for ends, kind in product([(0, 1), (1, 0)], "BF")]
    assert transfers(schedule, 1).sends.keys() == {Action("F", 0, 2), Action("B", 0, 1)}


def stuck(schedule: Schedule, group_of: Callable[[Channel], Hashable], reverse: bool) -> bool:
    """Whether a run stands still if the operations of a group run one by one in the order of their issue.

    A transfer happens when its send is at the head of one rank's queue and its receive at the head of
    the other's. A slot waits for what it uses. Sends wait for nothing; a pair's come in either order.
    """
    plans = [transfers(schedule, rank) for rank in range(schedule.num_ranks)]
    queues: dict[tuple[int, Hashable], deque[tuple[str, Message]]] = defaultdict(deque)
    by_result = {m.result: m for plan in plans for due in plan.receives for m in due}
    arrived: set[Action] = set()
    position, begun = [0] * schedule.num_ranks, [-1] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, slots in enumerate(schedule.slots):
            index = position[rank]
            if index == len(slots):
                continue
            if begun[rank] < index:
                begun[rank], moved = index, True
                for message in plans[rank].receives[index]:
                    queues[rank, group_of(message.channel)].append(("receive", message))
            sources = [source for action in slots[index] if (source := schedule.source(action))]
            if all(source in arrived for source in sources if source in by_result):
                position[rank], moved = index + 1, True
                for action in reversed(slots[index]) if reverse else slots[index]:
                    if action in plans[rank].sends:
                        message = by_result[action]
                        queues[rank, group_of(message.channel)].append(("send", message))
        for queue in list(queues.values()):
            while queue:
                message = queue[0][1]
                other = queues[message.channel.destination, group_of(message.channel)]
                if queue[0][0] == "receive" or not other or other[0] != ("receive", message):
                    break
                queue.popleft(), other.popleft()
                arrived.add(message.result)
                moved = True
    return any(queues.values()) or position != [len(slots) for slots in schedule.slots]


SIZES = list(product((1, 2, 3, 4, 5, 8), (1, 2, 3, 5, 8, 13, 16)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_channels_of_their_own_never_deadlock(ranks: int, microbatches: int, reverse: bool) -> None:
    placements = [[(rank,) for rank in range(ranks)], [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]]
    forwards = [forward_only(stages, microbatches) for stages in placements]
    for schedule in (*schedules(ranks, microbatches), *forwards):
        assert not stuck(schedule, lambda channel: channel, reverse), schedule.name


def test_one_group_for_both_directions_would_deadlock() -> None:
    """The reason for the channels: a receive put up early holds back the send behind it, on both sides."""
    for ranks in (2, 3, 4, 8):
        ends = lambda channel: frozenset((channel.source, channel.destination))  # noqa: E731
        assert stuck(one_f_one_b(ranks, 2 * ranks), ends, False)
