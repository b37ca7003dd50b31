"""The trace that Perfetto opens: an event per action, in whole microseconds, never half over another."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from parallel.pipeline.action import parse
from parallel.pipeline.schedules import FORMS, make
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Span, Timeline
from parallel.pipeline.trace import trace

COSTS = Costs(f=1 / 3, b=0.7, w=0.3, a2a=0.1)  # no whole microseconds


def timeline(name: str) -> Timeline:
    schedule = make(name, 4, 8)
    return simulate(schedule, COSTS.price(schedule))


def slices(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in json.loads(json.dumps(content))["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("name", FORMS)
def test_one_event_per_action_on_its_rank(name: str) -> None:
    mine = timeline(name)
    events = slices(trace([mine], [name]))
    found = Counter(
        (e["tid"], e["args"]["kind"], e["args"]["microbatch"], e["args"]["stage"]) for e in events
    )
    due = Counter(
        (rank, action.kind, action.microbatch, action.stage)
        for rank in range(4)
        for action in mine.schedule.actions(rank)
    )
    assert found == due and set(due.values()) == {1}
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)


@pytest.mark.parametrize("name", FORMS)
def test_events_meet_but_never_overlap_unless_they_are_a_pair(name: str) -> None:
    events = slices(trace([timeline(name)], [name]))
    pairs = 0
    for rank in range(4):
        for before, after in pairwise(event for event in events if event["tid"] == rank):
            assert isinstance(after["ts"], int) and isinstance(after["dur"], int)
            if "&" in after["args"]["slot"] and before["args"]["slot"] == after["args"]["slot"]:
                assert (before["ts"], before["dur"]) == (after["ts"], after["dur"])
                pairs += 1
            else:
                assert before["ts"] + before["dur"] <= after["ts"]
    assert (pairs > 0) == ("&" in str(make(name, 4, 8)))


def test_moments_and_names() -> None:
    schedule = parse("mine: 2 microbatches\nrank 0, stages 0 1: F0 F0' F1&B0'")
    begins = [7.0, 8.0, 9.0, 12.0]
    spans = [
        Span(slot, begin, end, exposed=0.25)
        for slot, (begin, end) in zip(schedule.slots[0], pairwise(begins), strict=True)
    ]
    events = slices(trace([Timeline(schedule, (tuple(spans),))], ["run"]))
    assert [(event["name"], event["ts"], event["dur"]) for event in events] == [
        ("F0", 0, 1_000_000),
        ("F0'", 1_000_000, 1_000_000),
        ("F1", 2_000_000, 3_000_000),
        ("B0'", 2_000_000, 3_000_000),
    ]
    assert events[3]["args"] == {
        "kind": "B",
        "microbatch": 0,
        "stage": 1,
        "slot": "F1&B0'",
        "exposed_us": 250_000,
    }
    assert events[3]["cat"] == "backward"


def test_timelines_are_processes_and_ranks_threads() -> None:
    content = trace([timeline("gpipe"), timeline("zb-h1")], ["simulated", "measured"])
    assert {event["pid"] for event in slices(content)} == {0, 1}
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"].get("name")
        for event in content["traceEvents"]
        if event["ph"] == "M"
    }
    assert names["process_name", 0, 0] == "simulated" and names["process_name", 1, 0] == "measured"
    assert names["thread_name", 1, 3] == "rank 3"
