"""Two microbatches in turn: the order of steps, what runs while rows travel, gradients equal to the bit."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from parallel.gradients import GradientBuffers, parameter_sets
from torch import Tensor

from moe.config import BalanceConfig
from moe.model.transformer import Microbatch, Transformer
from parallel.collectives import Splits, Wire, start_all_to_all
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.pipeline import tape as tape_module
from parallel.pipeline.overlap import forward_backward, run, run_pair
from parallel.pipeline.tape import Steps, Tape
from parallel.shards import canonical
from tests.ranks import run_ranks
from tests.small import SMALL_MODEL


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


def schedule(monkeypatch: pytest.MonkeyPatch, *, overlap: bool) -> tuple[list[str], list[object]]:
    log: list[str] = []
    names: dict[int, int] = {}
    tapes = []  # kept, so that no two share an id

    def forward(tape: Tape, microbatch: int) -> Steps:
        names[id(tape)] = microbatch
        tapes.append(tape)
        return counting(f"F{microbatch}.", 1, log)

    monkeypatch.setattr(Tape, "backward", lambda tape: counting(f"B{names[id(tape)]}.", 1, log))
    return log, list(forward_backward(forward, [0, 1, 2], overlap=overlap))


def test_overlapped_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log, returned = schedule(monkeypatch, overlap=True)
    pairs = [[f"F{i}.0", f"B{i - 1}.0", f"F{i}. ends", f"B{i - 1}. ends"] for i in (1, 2)]
    assert log == ["F0.0", "F0. ends", *pairs[0], *pairs[1], "B2.0", "B2. ends"]
    assert returned == ["F0.", "F1.", "F2."]


def test_serial_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log, returned = schedule(monkeypatch, overlap=False)
    assert log == [f"{kind}{i}.{end}" for i in range(3) for kind in "FB" for end in ("0", " ends")]
    assert returned == ["F0.", "F1.", "F2."]


def test_no_microbatches() -> None:
    assert list(forward_backward(lambda tape, value: counting("F", 1, []), [], overlap=True)) == []


@pytest.mark.parametrize("overlap", [False, True])
def test_recomputation_reaches_every_tape(overlap: bool) -> None:
    weight, calls = torch.nn.Parameter(torch.ones(())), []

    def forward(tape: Tape, microbatch: int) -> Steps:
        tape.root(tape.compute(lambda: (calls.append(microbatch), weight * microbatch)[1]), 1.0)
        yield

    for recompute, expected in ((False, [1, 2]), (True, [1, 1, 2, 2])):
        calls.clear()
        list(forward_backward(forward, [1, 2], overlap=overlap, recompute=recompute))
        assert sorted(calls) == expected
    assert weight.grad is not None and weight.grad.item() == 6.0


# A model over two ranks, three microbatches each, with uneven routing.

CONFIG = replace(SMALL_MODEL, num_mtp_layers=1, init_std=0.2)
BALANCE = BalanceConfig(sequence_aux=0.1)


class Case(NamedTuple):
    model: Transformer
    buffers: GradientBuffers
    microbatches: list[Microbatch]


def build_case(rank: int, world_size: int) -> Case:
    groups = build_groups(Layout(dp=world_size, ep=world_size))
    model = Transformer(CONFIG, BALANCE, groups.ep)
    for _, router in model.routers():
        router.bias.copy_(torch.linspace(0.3, -0.3, CONFIG.num_experts))
    stream = torch.Generator().manual_seed(rank)
    microbatches = []
    for _ in range(3):
        tokens, labels = torch.randint(CONFIG.vocab_size, (2, 2, 6), generator=stream)
        valid = torch.ones(2, 6, dtype=torch.bool)
        weights = (0.1, 0.03)
        microbatches.append(Microbatch(tokens=tokens, labels=labels, valid=valid, loss_weights=weights))
    return Case(model, GradientBuffers(parameter_sets(model.parameters(), groups)), microbatches)


def gradients(rank: int, world_size: int, overlap: bool, recompute: bool) -> dict[str, Tensor]:
    """Every gradient and every loss, by name."""
    case = build_case(rank, world_size)
    outcomes = list(
        forward_backward(case.model.phases, case.microbatches, overlap=overlap, recompute=recompute)
    )
    case.buffers.reduce()
    found = {f"loss {i}": outcome.losses.detach() for i, outcome in enumerate(outcomes)}
    for i, outcome in enumerate(outcomes):
        found |= {f"counts {i} {layer}": load.counts_E for layer, load in outcome.loads.items()}
    for name, parameter in case.model.named_parameters():
        found |= dict(canonical(name, parameter, parameter.main_grad))
    return found


@pytest.mark.parametrize(("overlap", "recompute"), [(True, False), (False, True), (True, True)])
def test_overlap_and_recomputation_change_no_bit(overlap: bool, recompute: bool) -> None:
    serial = run_ranks(2, gradients, False, False)
    for expected, found in zip(serial, run_ranks(2, gradients, overlap, recompute), strict=True):
        assert expected.keys() == found.keys()
        trained = [gradient.any() for name, gradient in expected.items() if name.endswith("weight")]
        assert sum(trained) > 0.9 * len(trained)
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        assert not different


class Event(NamedTuple):
    who: str  # F0, B0, F1, ...
    what: str  # compute, start, wait
    exchange: int  # which one; -1 for compute
    shape: tuple[int, ...] = ()


class Listener:
    """Writes down who computes, who puts rows on the wire, and who waits for which."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.who = ""
        self._tapes: list[Tape] = []
        self._started = 0
        patch.setattr(tape_module, "start_all_to_all", self._start)
        patch.setattr(Tape, "compute", self._computing(Tape.compute))
        patch.setattr(torch.autograd, "backward", self._computing(torch.autograd.backward))
        patch.setattr(Tape, "backward", self._backward(Tape.backward))

    def forward(self, model: Transformer, tape: Tape, microbatch: Microbatch) -> Steps:
        self._tapes.append(tape)
        return self._named(f"F{len(self._tapes) - 1}", model.phases(tape, microbatch))

    def _named(self, who: str, steps: Steps) -> Steps:
        while True:
            self.who = who
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value
            yield

    def _backward(self, original):
        def backward(tape: Tape) -> Steps:
            return self._named(f"B{self._tapes.index(tape)}", original(tape))

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
    case = build_case(rank, world_size)
    with pytest.MonkeyPatch.context() as patch:
        listener = Listener(patch)
        forward = partial(listener.forward, case.model)
        list(forward_backward(forward, case.microbatches, overlap=overlap))
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
            assert len(shares) == 6 and all(shares)  # two exchanges in each of three layers of experts
            shares = [backward in others for who, others in hidden if who == forward]
            assert len(shares) == 6 and sum(shares) >= 4


def test_serial_microbatches_never_meet() -> None:
    for events in run_ranks(2, listen, False):
        assert all(others <= {who} for who, others in hiding(events))


def test_shared_experts_run_while_their_own_rows_travel() -> None:
    """Serially too: the dispatch of a forward and the returned rows' gradient have company."""
    for events in run_ranks(2, listen, False):
        for kind in "FB":
            own = [who in others for who, others in hiding(events) if who == f"{kind}0"]
            assert len(own) == 6 and all(own[0::2])


def test_every_rank_takes_the_same_steps() -> None:
    """Whatever the routing: collectives made in different orders would hang or mix rows up."""
    for overlap in (False, True):
        first, second = run_ranks(2, listen, overlap)
        assert first == second
