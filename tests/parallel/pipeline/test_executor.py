"""The executor on gloo ranks: any schedule gives one rank's losses and gradients, to the bit."""

import gc
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Splits
from parallel.errors import UserError
from parallel.pipeline import link as link_module
from parallel.pipeline.action import Schedule, parse
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.executor import execute
from parallel.pipeline.gpipe import forward_only, gpipe
from parallel.pipeline.link import Boundary, Link, connect
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.tape import Direct, Recorder, Steps, Tape
from parallel.pipeline.transfers import channels
from tests.parallel.pipeline.every import schedules
from tests.parallel.pipeline.toy import (
    BOUNDARY,
    ToyMicrobatch,
    ToyStage,
    toy_cut,
    toy_microbatches,
    toy_place,
    toy_splits,
    toy_stages,
)
from tests.ranks import RankFailure, run_ranks

ALONE = Link(0, {})
MICROBATCHES = {1: (1, 2, 5), 2: (1, 2, 3, 4, 6), 3: (1, 3, 7), 4: (1, 3, 8), 8: (16,)}  # by ranks
OWN_ROWS = Splits((4,), (4,), None)
Found = dict[str, Tensor]


def gradients(stages: dict[int, ToyStage]) -> Found:
    return {name: p.main_grad for stage in stages.values() for name, p in stage.named_parameters()}


def train(schedule: Schedule, stages: dict[int, ToyStage], link: Link, seed: int, **options: Any) -> Found:
    """Every gradient and every loss that this rank has."""
    for stage in stages.values():
        for parameter in stage.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
    microbatches = toy_microbatches(schedule.num_microbatches, seed)
    walked = execute(schedule, stages, microbatches, link=link, boundary=BOUNDARY, **options)
    losses = {f"loss {i}": loss for (i, _), loss in walked.returned.items() if loss is not None}
    return gradients(stages) | losses


def cases(num_ranks: int) -> dict[tuple[int, bool, str], Schedule]:
    """By (microbatches, recompute, name)."""
    return {
        (schedule.num_microbatches, recompute, f"{schedule.name} {schedule.num_stages}"): schedule
        for microbatches in MICROBATCHES[num_ranks]
        for schedule in schedules(num_ranks, microbatches)
        for recompute in (False, True)
    }


def train_all(rank: int, world_size: int, num_ranks: int) -> tuple[int, dict[tuple[int, bool, str], Found]]:
    place, links, results = toy_place(rank, world_size, num_ranks), {}, {}
    for case, schedule in cases(num_ranks).items():
        known = tuple(channels(schedule))
        if known not in links:
            links[known] = connect(schedule, place.pipeline, torch.device("cpu"))
        link = links[known]
        stages = toy_stages(schedule.num_stages, schedule.stages[link.rank], toy_splits(place.experts))
        results[case] = train(schedule, stages, link, place.column, recompute=case[1])
    return place.column, results


def serial(rank: int, world_size: int, numbers: tuple[int, ...]) -> dict[int, Found]:
    """The whole model on one stage, a microbatch after the other, by the number of microbatches."""
    place = toy_place(rank, world_size, 1)
    stages = toy_stages(1, [0], toy_splits(place.experts))
    return {n: train(one_f_one_b(1, n), stages, ALONE, place.column) for n in numbers}


@pytest.mark.parametrize(("num_ranks", "beside"), [(1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (2, 2), (8, 1)])
def test_every_schedule_equals_one_rank_to_the_bit(num_ranks: int, beside: int) -> None:
    """To rounding where a stage is held twice, its gradients being two sums: these with and without pairs."""
    expected = run_ranks(beside, serial, MICROBATCHES[num_ranks])
    results = run_ranks(num_ranks * beside, train_all, num_ranks)
    for case in cases(num_ranks):
        for column, whole in enumerate(expected):
            found: Found = {}
            for by_case in (by_case for at, by_case in results if at == column):
                for name, value in by_case[case].items():
                    found[name] = found[name] + value if name in found else value
            assert found.keys() == whole[case[0]].keys() and len(found) == 9 + case[0]
            for name, value in found.items():
                if case[2].startswith("dualpipe ") and not name.startswith("loss"):
                    torch.testing.assert_close(value, whole[case[0]][name], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(value, whole[case[0]][name]), (case, name)
    for case in (case for case in cases(num_ranks) if "serial" in case[2]):
        paired = (*case[:2], case[2].replace(" serial", ""))
        for _, by_case in results:
            assert all(torch.equal(by_case[case][name], value) for name, value in by_case[paired].items())


def evaluate(rank: int, world_size: int) -> tuple[list[Any], bool]:
    place = toy_place(rank, world_size, world_size)
    schedule, entered = forward_only([(r,) for r in range(world_size)], 5), []
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    stages = toy_stages(world_size, [link.rank], OWN_ROWS)
    walked = execute(
        schedule, stages, toy_microbatches(5), link=link, boundary=BOUNDARY, on_enter=entered.append
    )
    losses = [walked.returned[number, link.rank] for number in range(5)]
    begin, end = toy_cut(world_size, link.rank)
    assert entered == [str(layer) for layer in range(begin, end)] * 5
    assert torch.is_grad_enabled()
    return losses, any(hasattr(p, "main_grad") or p.grad is not None for p in stages[link.rank].parameters())


def test_forwards_alone_are_an_evaluation() -> None:
    expected = serial_losses(5)
    results = run_ranks(4, evaluate)
    assert [losses for losses, _ in results[:-1]] == [[None] * 5] * 3
    assert torch.equal(torch.stack(results[-1][0]), expected)
    assert not any(trained for _, trained in results)


def serial_losses(number: int) -> Tensor:
    found = train(one_f_one_b(1, number), toy_stages(1, [0], OWN_ROWS), ALONE, 0)
    return torch.stack([found[f"loss {i}"] for i in range(number)])


def test_an_evaluation_is_recorded_by_nobody() -> None:
    class Probe:
        def phases(self, tape: Recorder, microbatch: int, hidden: Tensor | None) -> Steps:
            assert isinstance(tape, Direct) and not torch.is_grad_enabled()
            yield
            return None, microbatch

    schedule = forward_only([(0,)], 3)
    for chosen in (schedule, parse("mine: 3 microbatches\nrank 0, stages 0: F2 F1 F0")):
        walked = execute(chosen, {0: Probe()}, [7, 8, 9], link=ALONE, boundary=BOUNDARY)
        assert walked.returned == {(0, 0): 7, (1, 0): 8, (2, 0): 9}


@pytest.mark.parametrize(("recompute", "calls"), [(False, [1, 2]), (True, [1, 1, 2, 2])])
@pytest.mark.parametrize("overlap", [False, True])
def test_recomputation_reaches_every_tape(overlap: bool, recompute: bool, calls: list[int]) -> None:
    weight, seen = torch.nn.Parameter(torch.ones(())), []

    class Probe:
        def phases(self, tape: Recorder, microbatch: int, hidden: Tensor | None) -> Steps:
            tape.root(tape.compute(lambda: (seen.append(microbatch), weight * microbatch)[1]), 1.0)
            yield
            return None, None

    schedule = one_f_one_b(1, 2, overlap=overlap)
    execute(schedule, {0: Probe()}, [1, 2], link=ALONE, boundary=BOUNDARY, recompute=recompute)
    assert sorted(seen) == calls
    assert weight.grad is not None and weight.grad.item() == 3.0


# Ranks with several stages, and stages on several ranks.

TURN = """turn: 3 microbatches
rank 0, stages 0 2: F0 F1 F0' B0' F2 F1'&B0 B1' F2'&B1 B2' B2
rank 1, stages 1: F0 F1 B0 F2 B1 B2"""
BOTH_WAYS = """both ways: 4 microbatches
rank 0, stages 0 1: F0 F1 F2' F3'&B2' B0 B3' B1
rank 1, stages 0 1: F2 F3 F0' F1'&B0' B2 B1' B3"""
V = """v: 2 microbatches
rank 0, stages 0 3: F0 F1 F0' B0' F1'&B0 B1' B1
rank 1, stages 1 2: F0 F0' F1 B0' B0 F1' B1' B1"""


def follow(rank: int, world_size: int, text: str, num_stages: int) -> Found:
    schedule, place = parse(text), toy_place(rank, world_size, world_size)
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    return train(schedule, toy_stages(num_stages, schedule.stages[rank], OWN_ROWS), link, 0)


@pytest.mark.parametrize(("text", "num_stages"), [(TURN, 3), (V, 4)])
def test_a_rank_may_hold_several_stages(text: str, num_stages: int) -> None:
    number = parse(text).num_microbatches
    expected = train(one_f_one_b(1, number), toy_stages(1, [0], OWN_ROWS), ALONE, 0)
    first, second = run_ranks(2, follow, text, num_stages)
    found = first | second
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_a_stage_may_be_held_twice_and_run_both_ways() -> None:
    expected = train(one_f_one_b(1, 4), toy_stages(1, [0], OWN_ROWS), ALONE, 0)
    first, second = run_ranks(2, follow, BOTH_WAYS, 2)
    for name in (name for name in expected if not name.startswith("loss")):
        torch.testing.assert_close(first[name] + second[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_walk_is_measured_slot_by_slot() -> None:
    class Sleeper:
        def phases(self, tape: Recorder, microbatch: float, hidden: Tensor | None) -> Steps:
            time.sleep(microbatch)
            yield
            return None, None

    schedule = one_f_one_b(1, 2)
    walked = execute(schedule, {0: Sleeper()}, [0.05, 0.01], link=ALONE, boundary=BOUNDARY)
    assert [span.slot for span in walked.spans] == list(schedule.slots[0])
    first, _, second, _ = (span.end - span.begin for span in walked.spans)
    assert first >= 0.05 and second >= 0.01
    assert all(before.end <= after.begin for before, after in pairwise(walked.spans))


class Scaling:
    """A stage that multiplies by its weight; the last one's loss is the sum of squares."""

    def __init__(self, stage: int, is_last: bool) -> None:
        self.weight, self.is_last = torch.nn.Parameter(torch.tensor(1.0 + stage)), is_last

    def phases(self, tape: Recorder, microbatch: Tensor, hidden: Tensor | None) -> Steps:
        rows = microbatch if hidden is None else hidden
        made = tape.compute(torch.mul, rows, tape.compute(lambda weight: weight * 1.0, self.weight))
        if self.is_last:
            tape.root(tape.compute(lambda rows: rows.square().sum(), made), 1.0)
        yield from ()
        return (None if self.is_last else made), None


def scale(rank: int, world_size: int, lengths: tuple[int, ...]) -> dict[int, Tensor]:
    schedule = dualpipe(world_size, len(lengths))
    place = toy_place(rank, world_size, world_size)
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    stages = {stage: Scaling(stage, stage == world_size - 1) for stage in schedule.stages[rank]}
    shapes = tuple((length, 2) for length in lengths)
    boundary = Boundary(shapes[0], torch.float32, torch.device("cpu"), shapes)
    rows = [torch.full(shape, 1.0) for shape in shapes]
    execute(schedule, stages, rows, link=link, boundary=boundary)
    return {number: stage.weight.grad for number, stage in stages.items()}


def test_microbatches_may_have_any_length() -> None:
    lengths = (3, 1, 5, 2)
    first, second = run_ranks(2, scale, lengths)
    # The loss is 2 n (1 w)^2 with weights 1 and 2; its gradients are 2 * 2 n * 4 / weight.
    for stage, weight in ((0, 1.0), (1, 2.0)):
        assert float(first[stage] + second[stage]) == 2 * 2 * sum(lengths) * 4 / weight


# Units: what a sharded optimizer hangs its gathers and reductions on.


def units(rank: int, world_size: int, overlap: bool) -> list[str]:
    place = toy_place(rank, world_size, world_size)
    schedule = one_f_one_b(world_size, 4, overlap=overlap)
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    stages = toy_stages(world_size, [link.rank], OWN_ROWS)
    log: list[str] = []
    at_leaving: Found = {}

    def leave(unit: str) -> None:
        log.append(f"leave {unit}")
        for name, parameter in stages[link.rank].layers[unit].named_parameters():
            at_leaving[f"layers.{unit}.{name}"] = parameter.main_grad.clone()

    found = train(
        schedule, stages, link, 0, on_enter=lambda unit: log.append(f"enter {unit}"), on_leave=leave
    )
    assert all(torch.equal(at_leaving[name], found[name]) for name in gradients(stages))
    return log


@pytest.mark.parametrize("overlap", [False, True])
def test_units_are_entered_by_every_forward_and_left_by_the_last_backward(overlap: bool) -> None:
    first, second = run_ranks(2, units, overlap)
    assert first == ["enter 0"] * 4 + ["leave 0"]
    assert second == ["enter 1", "enter 2"] * 4 + ["leave 2", "leave 1"]


# Channels opened at once, receives ahead, sends held, failures.


def open_channels(rank: int, world_size: int) -> list[tuple[str, int]]:
    log: list[tuple[str, int]] = []
    place = toy_place(rank, world_size, world_size)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("send", "recv"):
            original = getattr(dist, name)
            patch.setattr(
                dist, name, lambda *a, name=name, do=original, **k: (log.append((name, rank)), do(*a, **k))
            )
        link = connect(gpipe(world_size, 1), place.pipeline, torch.device("cpu"))
    assert sorted(link.groups) == [
        c for c in channels(gpipe(world_size, 1)) if rank in (c.source, c.destination)
    ]
    assert len(set(link.groups.values())) == len(link.groups)
    return log


def test_every_channel_is_open_before_the_first_result() -> None:
    """NCCL opens a channel at first use, where both ends wait: a receive put up early would stop its rank."""
    first, second, third = run_ranks(3, open_channels)
    assert first == [("send", 0), ("recv", 0)] and third == [("recv", 2), ("send", 2)]
    assert second == [("recv", 1), ("send", 1), ("send", 1), ("recv", 1)]


def test_an_unlawful_schedule_is_not_connected() -> None:
    with pytest.raises(UserError, match="rank 0 runs B0@0, but a B follows"):
        connect(parse("mine: 1 microbatches\nrank 0, stages 0: B0 F0"), None, torch.device("cpu"))


class Indifferent:
    """A last stage whose loss does not depend on what it is given."""

    def phases(self, tape: Recorder, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
        yield
        return None, None


def ignore(rank: int, world_size: int) -> list[float]:
    place, schedule = toy_place(rank, world_size, world_size), one_f_one_b(world_size, 3)
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    stage: Any = Indifferent() if rank == 1 else toy_stages(world_size, [rank], OWN_ROWS)[rank]
    execute(schedule, {rank: stage}, toy_microbatches(3), link=link, boundary=BOUNDARY)
    return [float(p.grad.abs().sum()) for p in stage.parameters()] if rank == 0 else []


def test_hidden_states_that_nothing_depends_on_have_zero_gradient() -> None:
    assert run_ranks(2, ignore)[0] == [0.0] * 3


def listen(rank: int, world_size: int) -> list[str]:
    log: list[str] = []
    place, schedule = toy_place(rank, world_size, world_size), one_f_one_b(world_size, 3)
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    stages = toy_stages(world_size, [link.rank], OWN_ROWS)

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (log.append(name), function(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "irecv", logged("receive", dist.irecv))
        patch.setattr(dist, "isend", logged("send", dist.isend))
        patch.setattr(ToyStage, "phases", logged("F", ToyStage.phases))
        patch.setattr(Tape, "backward", logged("B", Tape.backward))
        train(schedule, stages, link, 0)
    return log


def test_receives_are_put_up_before_the_compute_that_precedes_their_use() -> None:
    first, second = run_ranks(2, listen)
    assert " ".join(first) == "F send receive F send B receive F send receive B B"
    assert " ".join(second) == "receive F receive B send F receive B send F B send"


def test_sent_results_are_let_go_when_they_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """On NCCL a send can be asked whether it is done; gloo says so only to who waits."""
    sent: list[Callable[[], Tensor | None]] = []
    held: list[int] = []
    waited: list[bool] = []

    class Done:
        def is_completed(self) -> bool:
            return True

        def wait(self) -> None:
            waited.append(True)

    def isend(value: Tensor, **_: Any) -> Done:
        assert value.is_contiguous()
        gc.collect()
        held.append(sum(reference() is not None for reference in sent))
        sent.append(weakref.ref(value))
        return Done()

    class Source:
        def phases(self, tape: Recorder, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
            yield
            return torch.empty(BOUNDARY.shape[::-1]).t(), None

    monkeypatch.setattr(link_module.dist, "isend", isend)
    monkeypatch.setattr(link_module, "_other_end", lambda group: 1)
    schedule = forward_only([(0,), (1,)], 5)
    link = Link(0, dict.fromkeys(channels(schedule)))  # type: ignore[arg-type]
    execute(schedule, {0: Source()}, toy_microbatches(5), link=link, boundary=BOUNDARY)
    assert held == [0, 1, 1, 1, 1]
    assert waited == [True]  # the last one, at the end


class Faulty:
    """A stage that fails in its second microbatch."""

    def __init__(self, stage: ToyStage) -> None:
        self.stage, self.calls = stage, 0

    def phases(self, tape: Recorder, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
        self.calls += 1
        if self.calls == 2:
            raise KeyError("from inside the stage")
        return (yield from self.stage.phases(tape, microbatch, hidden))


def fail(rank: int, world_size: int, faulty: int) -> None:
    place, schedule = toy_place(rank, world_size, world_size), one_f_one_b(world_size, 4, overlap=True)
    link = connect(schedule, place.pipeline, torch.device("cpu"))
    stages: dict[int, Any] = dict(toy_stages(world_size, [rank], OWN_ROWS))
    if rank == faulty:
        stages = {rank: Faulty(stages[rank])}
    execute(schedule, stages, toy_microbatches(4), link=link, boundary=BOUNDARY)


@pytest.mark.parametrize("faulty", [0, 1])
def test_what_a_stage_raises_is_raised(faulty: int) -> None:
    with pytest.raises(RankFailure, match="KeyError: 'from inside the stage'"):
        run_ranks(2, fail, faulty, timeout=20)


def test_hidden_states_must_fit_the_boundary() -> None:
    class Wide:
        def phases(self, tape: Recorder, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
            yield
            return torch.zeros(4, 7), None

    with pytest.raises(AssertionError, match=r"F0@0 made \(4, 7\) of torch.float32, but the boundary is"):
        execute(
            forward_only([(0,), (1,)], 1), {0: Wide()}, toy_microbatches(1), link=ALONE, boundary=BOUNDARY
        )
