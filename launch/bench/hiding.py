"""How much of the all-to-all a schedule hides: what the ranks of `switchyard bench overlap` do.

A step is forward and backward of the real model by the real executor, without the reduction of gradients.
In every round four things are timed in turn: the serial order with rows that stay where they are (compute
alone), the exchanges of a step one after the other without any compute, the serial order, and the
overlapped one. Hidden is compute + exchange - overlapped. What can be hidden is the shorter of compute
and exchange, and of it as much as the schedule has in pairs: a forward that fills the pipeline has no
partner. The link is changed by the process that made it: rank 0 asks for it in a file (`Dial`).
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.bench.pauses import Exercise, Paused
from moe.config import RunConfig
from moe.model.transformer import Microbatch
from moe.rules import validate
from moe.telemetry.rows import replace_file
from moe.train.runner import make_schedule
from moe.train.step import make_model
from moe.train.units import parameter_units
from moe.train.world import world
from parallel.collectives import all_reduce, start_all_to_all
from parallel.groups import Groups, build_groups
from parallel.pipeline.action import Schedule
from parallel.pipeline.executor import Stage, execute
from parallel.pipeline.link import Boundary, connect
from parallel.pipeline.tape import Recorder, Steps
from parallel.zero import Zero

FIRST = 200.0  # Mbit/s, for a first look at exchange alone
POLL_SECONDS = 0.005
WANTED, DONE, RESULT = "wanted", "done", "result.json"


@dataclass(frozen=True, kw_only=True)
class HidingPlan:
    """What the ranks are to measure. `rates`: in that at which exchange is as long as compute."""

    config: RunConfig
    pause_seconds: float  # 0: the model computes
    rounds: int
    rates: tuple[float, ...]


class Dial:
    """Sets the rate of the link by asking whoever made it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._asked = folder, rank, 0

    def turn(self, rate: float) -> None:
        """Return on every rank when the link has this rate, in Mbit/s."""
        self._asked += 1
        if self._rank == 0:
            replace_file(self._folder / WANTED, f"{self._asked} {rate}".encode())
            while _read(self._folder / DONE) != str(self._asked):
                time.sleep(POLL_SECONDS)
        dist.barrier()


def serve(folder: Path, set_rate: Callable[[float], None], ended: Callable[[], bool]) -> None:
    """What the maker of the link does until `ended`: set each rate that is asked for."""
    last = ""
    while not ended():
        asked, _, rate = _read(folder / WANTED).partition(" ")
        if asked != last:
            set_rate(float(rate))
            replace_file(folder / DONE, asked.encode())
            last = asked
        time.sleep(POLL_SECONDS)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def measure(plan: HidingPlan, folder: Path) -> None:
    """Measure, on every rank; rank 0 leaves the rows in the folder."""
    with world():
        groups = build_groups(validate(plan.config, dist.get_world_size()))
        bench = _Bench(plan, groups)
        dial = Dial(folder, groups.rank)
        dial.turn(FIRST)
        bench.step(bench.serial, wireless=True)  # warms up
        compute = statistics.median(bench.step(bench.serial, wireless=True) for _ in range(plan.rounds))
        balanced = FIRST * bench.exchange() / compute
        rows = [_row(bench, dial, plan.rounds, multiple * balanced) for multiple in plan.rates]
        if groups.rank == 0:
            replace_file(folder / RESULT, json.dumps(rows).encode())


def _row(bench: "_Bench", dial: Dial, rounds: int, rate: float) -> dict[str, Any]:
    times: dict[str, list[float]] = {"compute": [], "exchange": [], "serial": [], "overlapped": []}
    dial.turn(rate)
    for _ in range(rounds):
        times["compute"].append(bench.step(bench.serial, wireless=True))
        times["exchange"].append(bench.exchange())
        times["serial"].append(bench.step(bench.serial))
        times["overlapped"].append(bench.step(bench.overlapped))
    shares = [
        (compute + exchange - overlapped) / (min(compute, exchange) * bench.paired)
        for compute, exchange, _, overlapped in zip(*times.values(), strict=True)
    ]
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    share = statistics.median(shares)
    return {"link_mbit": rate, **medians, "paired": bench.paired, "hidden_share": share, "all_shares": shares}


class _Bench:
    """A model, its microbatches, and a step of it in either order."""

    def __init__(self, plan: HidingPlan, groups: Groups) -> None:
        config = plan.config
        layout, size = config.layout, config.train.batch_size // groups.layout.dp
        self.overlapped = make_schedule(replace(layout, overlap=True), layout.microbatches)
        self.serial = make_schedule(replace(layout, overlap=False), layout.microbatches)
        self._exercise = Exercise(pause_seconds=plan.pause_seconds)
        model = make_model(config, groups)
        self._zero = Zero(parameter_units(model, groups), groups.world)  # gives room for gradients
        held = sorted(self.overlapped.stages[groups.index("pp")])
        self._stages: dict[int, Stage] = {
            number: _PausedStage(stage, self._exercise)
            for number, stage in zip(held, model.stages(), strict=True)
        }
        self._microbatches = _microbatches(config, groups, size // layout.microbatches)
        hidden = (*self._microbatches[0].tokens.shape, config.model.hidden_size)
        self._boundary = Boundary(hidden, torch.float32, torch.device("cpu"))
        self._link = connect(self.overlapped, groups.pp, torch.device("cpu"))

    @property
    def paired(self) -> float:
        """The share of forwards and backwards that have a partner; alike on every rank here."""
        slots = self.overlapped.slots[self._link.rank]
        lengths = [len(slot) for slot in slots if slot[0].kind != "W"]
        return sum(length for length in lengths if length > 1) / sum(lengths)

    def step(self, schedule: Schedule, *, wireless: bool = False) -> float:
        """Seconds of the slowest rank for one step."""
        self._exercise.exchanges.clear()
        self._exercise.wireless = wireless
        link, boundary = self._link, self._boundary
        return _slowest(
            partial(execute, schedule, self._stages, self._microbatches, link=link, boundary=boundary)
        )

    def exchange(self) -> float:
        """Seconds of the slowest rank for the exchanges of the last step, one by one."""
        return _slowest(self._exchange)

    def _exchange(self) -> None:
        for shape, splits in self._exercise.exchanges:
            for each in (splits, splits.reversed()):
                start_all_to_all(torch.zeros(sum(each.send), *shape), each).wait()


def _slowest(work: Callable[[], Any]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    return all_reduce(seconds, dist.group.WORLD, op=dist.ReduceOp.MAX).item()


def _microbatches(config: RunConfig, groups: Groups, size: int) -> list[Microbatch]:
    stream = torch.Generator().manual_seed(groups.index("dp"))
    count, length = config.layout.microbatches, config.data.sequence_length
    tokens = torch.randint(config.model.vocab_size, (count, size, length), generator=stream)
    valid = torch.ones(size, length, dtype=torch.bool)
    return [Microbatch(tokens=each, labels=each, valid=valid) for each in tokens]


class _PausedStage:
    def __init__(self, stage: Stage, exercise: Exercise) -> None:
        self._stage, self._exercise = stage, exercise

    def phases(self, tape: Recorder, microbatch: Any, hidden: Tensor | None) -> Steps:
        return self._stage.phases(Paused(tape, self._exercise), microbatch, hidden)
