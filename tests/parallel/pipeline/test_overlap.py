"""Two generators in turn: the order of their steps, and what runs while rows travel."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from torch import Tensor

from parallel.collectives import Splits, Wire, start_all_to_all
from parallel.pipeline import tape as tape_module
from parallel.pipeline.executor import execute
from parallel.pipeline.link import Link
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.overlap import run_pair
from parallel.pipeline.tape import Steps, Tape, run
from tests.parallel.pipeline.toy import (
    BOUNDARY,
    ToyMicrobatch,
    ToyStage,
    toy_microbatches,
    toy_place,
    toy_splits,
    toy_stages,
)
from tests.ranks import run_ranks


def counting(name: str, steps: int, log: list[str]) -> Steps:
    for step in range(steps):
        log.append(f"{name}{step}")
        yield
    log.append(f"{name} ends")
    return name


def test_run_gives_what_the_generator_returns() -> None:
    log: list[str] = []
    assert run(counting("a", 2, log)) == "a"
    assert log == ["a0", "a1", "a ends"]


def test_a_pair_is_stepped_in_turn_to_both_ends() -> None:
    log: list[str] = []
    assert run_pair(counting("a", 1, log), counting("b", 3, log)) == ("a", "b")
    assert log == ["a0", "b0", "a ends", "b1", "b2", "b ends"]
    assert run_pair(counting("a", 3, []), counting("b", 0, [])) == ("a", "b")


class Event(NamedTuple):
    who: str  # F0, B0, F1, ...
    what: str  # compute, start, wait
    exchange: int  # which one; -1 for compute
    shape: tuple[int, ...] = ()


class Listener:
    """A stage that writes down who computes, who puts rows on the wire, and who waits for which."""

    def __init__(self, stage: ToyStage, patch: pytest.MonkeyPatch) -> None:
        self._stage = stage
        self.events: list[Event] = []
        self.who = ""
        self._tapes: list[Tape] = []
        self._started = 0
        patch.setattr(tape_module, "start_all_to_all", self._start)
        patch.setattr(Tape, "compute", self._computing(Tape.compute))
        patch.setattr(tape_module, "_run_backward", self._computing(tape_module._run_backward))
        patch.setattr(Tape, "backward", self._backward(Tape.backward))

    def phases(self, tape: Tape, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
        self._tapes.append(tape)
        return self._named(f"F{len(self._tapes) - 1}", self._stage.phases(tape, microbatch, hidden))

    def _named(self, who: str, steps: Steps) -> Steps:
        while True:
            self.who = who
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value
            yield

    def _backward(self, original):
        def backward(tape: Tape, **options: bool) -> Steps:
            return self._named(f"B{self._tapes.index(tape)}", original(tape, **options))

        return backward

    def _computing(self, original):
        def compute(*args, **kwargs):
            self.events.append(Event(self.who, "compute", -1))
            return original(*args, **kwargs)

        return compute

    def _start(self, rows: Tensor, splits: Splits) -> "HeardWire":
        number, self._started = self._started, self._started + 1
        self.events.append(Event(self.who, "start", number, tuple(rows.shape[1:])))
        return HeardWire(start_all_to_all(rows, splits), self, number)


class HeardWire:
    def __init__(self, wire: Wire, listener: Listener, number: int) -> None:
        self.wire, self.listener, self.number = wire, listener, number

    def wait(self) -> Tensor:
        assert self.wire.work is not None  # a handle: the exchange was not simply made
        self.listener.events.append(Event(self.listener.who, "wait", self.number))
        return self.wire.wait()


def listen(rank: int, world_size: int, overlap: bool) -> list[Event]:
    place = toy_place(rank, world_size, 1)
    (stage,) = toy_stages(1, [0], toy_splits(place.experts)).values()
    schedule = one_f_one_b(1, 3, overlap=overlap)
    with pytest.MonkeyPatch.context() as patch:
        listener = Listener(stage, patch)
        execute(schedule, {0: listener}, toy_microbatches(3), link=Link(0, {}), boundary=BOUNDARY)
    return listener.events


def hiding(events: list[Event]) -> Iterator[tuple[str, set[str]]]:
    """Each exchange's owner, and who computed between its start and its wait."""
    for begin, event in enumerate(events):
        if event.what == "start":
            end = next(i for i, e in enumerate(events) if (e.what, e.exchange) == ("wait", event.exchange))
            assert events[end].who == event.who
            yield event.who, {e.who for e in events[begin:end] if e.what == "compute"}


def test_one_microbatch_computes_while_the_others_rows_travel() -> None:
    for events in run_ranks(2, listen, True):
        hidden = list(hiding(events))
        for backward, forward in (("B0", "F1"), ("B1", "F2")):
            shares = [forward in others for who, others in hidden if who == backward]
            assert len(shares) == 6 and all(shares)  # two exchanges in each of three layers
            shares = [backward in others for who, others in hidden if who == forward]
            assert len(shares) == 6 and sum(shares) >= 4


def test_serial_microbatches_never_meet() -> None:
    for events in run_ranks(2, listen, False):
        assert all(others <= {who} for who, others in hiding(events))


def test_what_is_beside_an_exchange_runs_while_its_rows_travel() -> None:
    """Serially too: the first exchange of a layer's forward and of its backward has company."""
    for events in run_ranks(2, listen, False):
        for kind in "FB":
            own = [who in others for who, others in hiding(events) if who == f"{kind}0"]
            assert len(own) == 6 and all(own[0::2])


def test_every_rank_takes_the_same_steps() -> None:
    """Collectives made in different orders would hang or mix rows up."""
    for overlap in (False, True):
        first, second = run_ranks(2, listen, overlap)
        assert first == second
