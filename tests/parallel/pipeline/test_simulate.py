"""What slots cost, when they begin, and how costs are read."""

import pytest

from parallel.errors import UserError
from parallel.pipeline.action import parse
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.simulate import Costs, Price, parse_costs, simulate

MIXED = parse("mine: 3 microbatches\nrank 0, stages 0: F0 F1&B0 W0 B1 F2 B2")


def test_prices() -> None:
    """Alone a slot waits for its all-to-all; a pair takes as long as its compute or its traffic."""
    forward, pair, weights, backward, *_ = MIXED.slots[0]
    price = Costs(f=1, b=5, w=2, a2a=0.5).price(MIXED)
    assert price(forward) == Price(1.5, 0.5)
    assert price(pair) == Price(4.0, 0.0)  # F and the input gradients, over 1.0 of traffic
    assert price(weights) == Price(2.0, 0.0)
    assert price(backward) == Price(5.5, 0.5)
    assert Costs(f=1, b=5, w=2, a2a=3).price(MIXED)(pair) == Price(6.0, 2.0)


def test_a_slot_begins_when_its_rank_is_free_and_its_input_has_come() -> None:
    schedule = one_f_one_b(2, 2)
    timeline = simulate(schedule, Costs(f=1, b=3).price(schedule), p2p=0.25)
    first, second = ([(span.begin, span.end) for span in mine] for mine in timeline.spans)
    assert first == [(0, 1), (1, 2), (5.5, 8.5), (9.5, 12.5)]
    assert second == [(1.25, 2.25), (2.25, 5.25), (5.25, 6.25), (6.25, 9.25)]
    assert timeline.makespan == 12.5
    assert timeline.bubbles == (4.5, 4.5)


def test_a_result_may_leave_before_its_slot_ends() -> None:
    """Both of a pair, each in its own time; and the rank is busy to the end."""
    text = "mine: 2 microbatches\nrank 0, stages 0: F0 F1 B0 B1\nrank 1, stages 1: F0 F1&B0 B1"
    timeline = simulate(parse(text), lambda slot: Price(len(slot) * 2.0, early=(0.5, 3.0)[: len(slot)]))
    first, second = ([(span.begin, span.end) for span in mine] for mine in timeline.spans)
    assert first == [(0, 2), (2, 4), (4.5, 6.5), (9.0, 11.0)]
    assert second == [(1.5, 3.5), (3.5, 7.5), (7.5, 9.5)]


def test_what_stays_on_a_rank_does_not_travel() -> None:
    schedule = parse("mine: 1 microbatches\nrank 0, stages 0 1: F0 F0' B0' B0")
    assert simulate(schedule, Costs().price(schedule), p2p=9.0).makespan == 6.0


def test_exposed_communication_is_added_up_by_rank() -> None:
    schedule = dualpipe(2, 4)
    timeline = simulate(schedule, Costs(a2a=0.5).price(schedule))
    alone = [sum(len(slot) == 1 and slot[0].kind != "W" for slot in slots) for slots in schedule.slots]
    assert timeline.exposed == tuple(0.5 * count for count in alone)


def test_costs_are_read() -> None:
    assert parse_costs("f=2, a2a=.5") == Costs(f=2.0, a2a=0.5)
    for text, sentence in (
        ("x=1", "must name f, b, w, a2a, p2p as in .* but has `x=1`"),
        ("f=-1", "but has `f=-1`"),
        ("f", "but has `f`"),
        ("b=1,w=2", "must not exceed it, but 2 > 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_costs(text)
