"""The tape: equal to plain autograd to the bit, recomputation too, and exchanges that are always made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import Splits, Wire, start_all_to_all
from parallel.linear import linear
from parallel.pipeline.tape import Direct, Recorder, Steps, Tape, _Compute, run
from tests.ranks import run_ranks


class Objective(Direct):
    """Plain autograd: the roots become one scalar to differentiate."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


class Toy:
    """Leaves with several readers, two outputs, values that are no tensors, a detached output, two roots."""

    def __init__(self, splits: Splits) -> None:
        torch.manual_seed(1)
        self.first, self.second = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
        self.splits, self.calls = splits, 0

    def parameters(self) -> list[nn.Parameter]:
        return [self.first, self.second]

    def mix(self, rows: Tensor, power: int) -> tuple[Tensor, str, Tensor, Tensor]:
        self.calls += 1
        mixed = (rows @ self.first).tanh()
        return mixed, "label", (mixed**power).mean(), mixed.argmax(-1)

    def phases(self, tape: Recorder, rows: Tensor) -> Steps:
        mixed, label, side, best = tape.compute(self.mix, rows, 2)
        assert label == "label" and best.shape == rows.shape[:1]
        tape.root(side, 0.25)
        arrival = tape.exchange(mixed, self.splits)
        meanwhile = tape.compute(lambda value: value @ self.second, mixed)
        yield
        back = tape.exchange(tape.compute(torch.sin, arrival.wait()), self.splits.reversed())
        yield
        total = tape.compute(lambda a, b, c: (a * b + c + a).sum(), back.wait(), meanwhile, mixed)
        tape.root(total, 2.0)
        return total


def differentiate(splits: Splits, tape: Recorder) -> tuple[list[Tensor], int]:
    """Gradients of the input and the weights, and how often `mix` ran."""
    toy, rows = Toy(splits), torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    run(toy.phases(tape, rows))
    if isinstance(tape, Tape):
        run(tape.backward())
    elif isinstance(tape, Objective):
        tape.total.backward()
    return [value.grad for value in (rows, *toy.parameters()) if value.grad is not None], toy.calls


def all_three(rank: int, world_size: int) -> list[list[Tensor]]:
    send = ((1, 3), (4, 0))[rank]
    splits = Splits(send, ((1, 4), (3, 0))[rank], dist.group.WORLD)
    return [differentiate(splits, tape)[0] for tape in (Objective(), Tape(), Tape(recompute=True))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_tape_equals_plain_autograd_and_recomputation_equals_both(world_size: int) -> None:
    alone = Splits((4,), (4,), None)
    recorders: list[Recorder] = [Objective(), Tape(), Tape(recompute=True)]
    results = [[differentiate(alone, recorder)[0] for recorder in recorders]]
    if world_size > 1:
        results = run_ranks(world_size, all_three)
    for plain, taped, recomputed in results:
        assert len(plain) == len(taped) == len(recomputed) == 3
        for expected, mine, again in zip(plain, taped, recomputed, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(mine, again)


def test_recomputation_runs_a_phase_twice_and_holds_no_graph() -> None:
    alone = Splits((4,), (4,), None)
    assert differentiate(alone, Tape())[1] == 1
    assert differentiate(alone, Tape(recompute=True))[1] == 2
    weight = nn.Parameter(torch.ones(2))
    for recompute in (False, True):
        tape = Tape(recompute=recompute)
        tape.root(tape.compute(lambda rows: (rows * weight).sum(), torch.ones(2)), 1.0)
        (record,) = tape._records.values()
        assert isinstance(record, _Compute)
        assert (record.results is None) == recompute


def test_a_phase_runs_on_leaves() -> None:
    tape, weight = Tape(), nn.Parameter(torch.ones(2))
    first = tape.compute(lambda rows: rows * weight, torch.ones(2))
    assert first.is_leaf and first.requires_grad
    untouched = tape.compute(lambda rows: (rows + 1).long(), torch.ones(2))
    assert not untouched.requires_grad


def test_roots_weigh_and_a_constant_root_is_none() -> None:
    weight = nn.Parameter(torch.ones(()))
    for recompute in (False, True):
        tape, weight.grad = Tape(recompute=recompute), None
        tape.root(tape.compute(lambda: weight * 3), 0.5)
        tape.root(tape.compute(lambda: torch.zeros(())), 7.0)
        run(tape.backward())
        assert weight.grad is not None and weight.grad.item() == 1.5


def test_an_output_returned_under_two_names_counts_once() -> None:
    tape, weight = Tape(), nn.Parameter(torch.ones(()))
    one, same = tape.compute(lambda: (weight * 1,) * 2)
    tape.root(tape.compute(torch.add, one, same), 1.0)
    run(tape.backward())
    assert weight.grad is not None and weight.grad.item() == 2.0


def unused_on_one_rank(rank: int, world_size: int, recompute: bool) -> tuple[Tensor | None, Tensor]:
    """Only rank 1 uses what the exchange brought; rank 0 must still take part in the way back."""
    weight, tape = nn.Parameter(torch.ones(1)), Tape(recompute=recompute)
    rows = tape.compute(lambda: weight * torch.tensor([[1.0], [2.0]]) * (rank + 1))
    arrived = tape.exchange(rows, Splits((1, 1), (1, 1), dist.group.WORLD)).wait()
    if rank == 1:
        tape.root(tape.compute(torch.sum, arrived), 1.0)
    run(tape.backward())
    assert weight.grad is not None
    return arrived.grad, weight.grad


@pytest.mark.parametrize("recompute", [False, True])
def test_an_unused_exchange_still_goes_back(recompute: bool) -> None:
    (first, grad_0), (second, grad_1) = run_ranks(2, unused_on_one_rank, recompute, timeout=20)
    assert first is None and second is not None
    assert (grad_0.item(), grad_1.item()) == (2.0, 4.0)  # the row that each sent to rank 1


class Logged(torch.autograd.Function):
    """Identity that tells when its backward runs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str, log: list[str]) -> Tensor:
        ctx.name, ctx.log = name, log
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(ctx.name)
        return grads[0], None, None


def test_backward_computes_what_it_can_and_yields_when_only_the_wire_is_left() -> None:
    log: list[str] = []

    def phase(name: str) -> Callable[..., Tensor]:
        return lambda *values: Logged.apply(sum(values), name, log)

    tape, alone = Tape(), Splits((2,), (2,), None)
    start = tape.compute(phase("before"), torch.ones(2, requires_grad=True))
    arrival = tape.exchange(start, alone)
    beside = tape.compute(phase("beside"), start)
    tape.root(tape.compute(torch.sum, tape.compute(phase("after"), arrival.wait(), beside)), 1.0)
    for _ in tape.backward():
        log.append("yield")
    assert log == ["after", "beside", "yield", "before"]


def test_a_backward_yields_once_for_what_travels_together() -> None:
    tape, alone = Tape(), Splits((2,), (2,), None)
    sent = tape.compute(lambda rows: (rows * 2, rows * 3), torch.ones(2, requires_grad=True))
    arrived = [arrival.wait() for arrival in [tape.exchange(rows, alone) for rows in sent]]
    tape.root(tape.compute(lambda *rows: sum(rows).sum(), *arrived), 1.0)
    assert len(list(tape.backward())) == 1


def test_a_backward_is_walked_once() -> None:
    tape, weight = Tape(), nn.Parameter(torch.ones(()))
    tape.root(tape.compute(lambda: weight * 3), 1.0)
    run(tape.backward())
    run(tape.backward())
    assert weight.grad is not None and weight.grad.item() == 3.0


def test_frozen_rows_make_no_backward_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(rows: Tensor, splits: Splits) -> Wire:
        started.append(rows)
        return start_all_to_all(rows, splits)

    monkeypatch.setattr("parallel.pipeline.tape.start_all_to_all", start)
    tape = Tape()
    assert not tape.exchange(torch.ones(2), Splits((2,), (2,), None)).wait().requires_grad
    run(tape.backward())
    assert len(started) == 1


def test_a_backward_may_begin_anywhere_with_a_gradient() -> None:
    """As on the last output of a pipeline's stage; the input's gradient is the leaf's."""
    hidden, weight, seed = torch.randn(2, 3, requires_grad=True), torch.randn(3, 3), torch.randn(2, 3)
    expected = torch.autograd.grad((hidden @ weight).tanh(), hidden, seed)[0]
    for recompute in (False, True):
        tape, hidden.grad = Tape(recompute=recompute), None
        tape.root(tape.compute(lambda rows: (rows @ weight).tanh(), hidden), seed.clone())
        run(tape.backward())
        assert hidden.grad is not None and torch.equal(hidden.grad, expected)


def test_a_value_that_is_two_roots_has_both_gradients() -> None:
    tape, weight = Tape(), nn.Parameter(torch.ones(()))
    value = tape.compute(lambda: weight * 3)
    tape.root(value, 0.5)
    tape.root(value, torch.ones(()))
    run(tape.backward())
    assert weight.grad is not None and weight.grad.item() == 4.5


class LoggedWire(NamedTuple):
    wire: Wire
    name: str
    log: list[str]

    def wait(self) -> Tensor:
        self.log.append(f"wait {self.name}")
        return self.wire.wait()


def test_units_are_left_when_all_behind_them_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit b's own exchange holds it back; one that was recorded before it does not."""
    log: list[str] = []
    alone = Splits((2,), (2,), None)
    tape = Tape(
        on_enter=lambda name: log.append(f"enter {name}"), on_leave=lambda name: log.append(f"leave {name}")
    )
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    tape.unit("a")
    unused = tape.exchange(first, alone).wait()
    assert unused.requires_grad
    tape.unit("b")
    log.append("exchange")
    tape.root(tape.compute(torch.sum, tape.exchange(second, alone).wait()), 1.0)
    assert log == ["enter a", "enter b", "exchange"]

    log.clear()
    names = iter(["in b", "before b"])
    monkeypatch.setattr(
        "parallel.pipeline.tape.start_all_to_all",
        lambda rows, splits: LoggedWire(start_all_to_all(rows, splits), next(names), log),
    )
    for _ in tape.backward():
        log.append("yield")
    assert log == ["yield", "wait in b", "leave b", "yield", "wait before b"]
    tape.weights()
    assert log[5:] == ["leave a"]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_unit_is_left_with_its_gradients_whole(recompute: bool) -> None:
    weights = {name: nn.Parameter(torch.ones(2)) for name in "abc"}
    found: dict[str, Tensor | None] = {}
    tape = Tape(recompute=recompute, on_leave=lambda name: found.update({name: weights[name].grad}))
    rows = torch.ones(2)
    for name, weight in weights.items():
        tape.unit(name)
        rows = tape.compute(torch.mul, rows, tape.compute(lambda value: value * 2, weight))
    tape.root(rows, torch.ones(2))
    run(tape.backward())
    tape.weights()
    assert list(found) == ["c", "b", "a"]
    assert all(gradient is not None and gradient.tolist() == [8.0, 8.0] for gradient in found.values())


def test_direct_tells_of_units_too() -> None:
    entered: list[str] = []
    Direct(entered.append).unit("a")
    Direct().unit("b")
    assert entered == ["a"]


class Layered(nn.Module):
    """Units of one product each; `away` ones send their rows off and back before."""

    def __init__(self, away: str) -> None:
        super().__init__()
        self.away = away
        self.weights = nn.ParameterList(nn.Parameter(torch.full((2, 2), 0.5)) for _ in away)
        for weight in self.weights:
            weight.main_grad = torch.zeros(2, 2)

    def phases(self, tape: Recorder, rows: Tensor) -> Steps:
        for number, weight in enumerate(self.weights):
            tape.unit(str(number))
            if self.away[number] == "x":
                arrival = tape.exchange(rows, Splits((2,), (2,), None))
                yield
                rows = arrival.wait()
            rows = tape.compute(linear, rows, weight)
        tape.root(tape.compute(torch.sum, rows), 1.0)

    def made(self) -> str:
        return "".join(str(n) for n, weight in enumerate(self.weights) if weight.main_grad.any())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("away", "made"), [("xxx", ["2", "12", "012"]), ("--x-", ["23"]), ("----", [])])
def test_weights_are_made_while_rows_travel(away: str, made: list[str], recompute: bool) -> None:
    """At every wait all that can be, without one when the next unit is done; units are left thereafter."""
    left: list[str] = []
    model, tape = Layered(away), Tape(recompute=recompute, on_leave=left.append)
    run(model.phases(tape, torch.ones(2, 2, requires_grad=True)))
    found = [model.made() for _ in tape.backward()]
    assert found == made
    assert left == list("3210")[4 - len(away) : -1]
    tape.weights()
    assert model.made() == "0123"[: len(away)] and left == list("3210")[4 - len(away) :]


def test_weights_apart_wait_for_their_turn() -> None:
    left: list[str] = []
    model, tape = Layered("-x--"), Tape(on_leave=left.append)
    rows = torch.ones(2, 2, requires_grad=True)
    run(model.phases(tape, rows))
    run(tape.backward(weights_apart=True))
    assert rows.grad is not None and model.made() == "" and left == []
    tape.weights()
    assert model.made() == "0123" and left == ["3", "2", "1", "0"]
