"""Walking schedules against the clock: what the ranks of `switchyard bench schedule` do.

Stages sleep instead of computing, since ranks may be more than cores: what is measured is the order, with
real ranks, sends and receives. What one rank alone takes for a forward, a backward, its parts and a pair
is measured first, and is what the simulator is fed with.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.bench.pauses import pause
from moe.telemetry.rows import replace_file
from moe.train.world import world
from parallel.collectives import Group, all_reduce, group_rank
from parallel.pipeline.action import Schedule, Slot
from parallel.pipeline.clock import gather_timeline
from parallel.pipeline.draw import draw
from parallel.pipeline.executor import execute
from parallel.pipeline.link import Boundary, Link, connect, disconnect
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.schedules import make
from parallel.pipeline.simulate import Price, simulate
from parallel.pipeline.summary import stage_share
from parallel.pipeline.tape import Recorder, Steps
from parallel.pipeline.timeline import Timeline
from parallel.pipeline.zb_h1 import zb_h1

CPU = torch.device("cpu")
BOUNDARY = Boundary((64, 64), torch.float32, CPU)
ALONE = 6  # microbatches of which one rank's costs are the medians
RESULT = "result.json"

Costs = dict[str, float]  # seconds by what a slot does: F, full B, B, W, F&B


@dataclass(frozen=True, kw_only=True)
class WalksPlan:
    """What the ranks are to walk. `seconds`: a forward of a rank's share of the model."""

    schedules: tuple[str, ...]
    ranks: int
    microbatches: int
    rounds: int
    seconds: float
    out: str


class _Sleeper:
    """A stage that takes its time and hands on what it was given."""

    def __init__(self, seconds: float, is_last: bool) -> None:
        self._seconds, self._is_last = seconds, is_last

    def phases(self, tape: Recorder, microbatch: Any, hidden: Tensor | None) -> Steps:
        taken = torch.ones(BOUNDARY.shape, requires_grad=True) if hidden is None else hidden
        made = tape.compute(partial(pause, seconds=self._seconds), taken)
        if self._is_last:
            tape.root(tape.compute(torch.sum, made), 1.0)
        yield from ()
        return (None if self._is_last else made), None


def measure(plan: WalksPlan, folder: Path) -> None:
    """Walk every schedule, on every rank; rank 0 draws each and leaves the rows in the folder."""
    with world():
        group = dist.group.WORLD if plan.ranks > 1 else None
        rows = []
        for name in plan.schedules:
            schedule = make(name, plan.ranks, plan.microbatches)
            seconds = plan.seconds * stage_share(schedule)
            costs = _alone(seconds, group)
            simulated = simulate(schedule, partial(_price, schedule, costs))
            measured = _walk(schedule, seconds, group, plan.rounds)
            middle = sorted(measured, key=lambda timeline: timeline.makespan)[len(measured) // 2]
            rows.append(
                {
                    "schedule": name,
                    "simulated_seconds": simulated.makespan,
                    "measured_seconds": middle.makespan,
                    "ratio": middle.makespan / simulated.makespan,
                    "all_measured_seconds": [timeline.makespan for timeline in measured],
                    "costs": costs,
                }
            )
            if group_rank(group) == 0:
                path = Path(plan.out) / f"measured-{name}-{plan.ranks}-{plan.microbatches}.png"
                draw([simulated, middle], [f"{name}, simulated", f"{name}, measured"], path, unit="s")
        if group_rank(group) == 0:
            replace_file(folder / RESULT, json.dumps(rows).encode())


def _alone(seconds: float, group: Group) -> Costs:
    """What every rank by itself takes for each kind of slot, in the mean over ranks."""
    found: dict[str, list[float]] = {}
    for schedule in (one_f_one_b(1, ALONE), zb_h1(1, ALONE), one_f_one_b(1, ALONE, overlap=True)):
        walked = execute(
            schedule, {0: _Sleeper(seconds, True)}, range(ALONE), link=Link(0, {}), boundary=BOUNDARY
        )
        for span in walked.spans:
            found.setdefault(_kind(schedule, span.slot), []).append(span.end - span.begin)
    medians = torch.tensor([statistics.median(values) for values in found.values()], dtype=torch.float64)
    means = all_reduce(medians, group) / (1 if group is None else dist.get_world_size(group))
    return dict(zip(found, means.tolist(), strict=True))


def _walk(schedule: Schedule, seconds: float, group: Group, rounds: int) -> Sequence[Timeline]:
    link, last = connect(schedule, group, CPU), schedule.num_stages - 1
    stages = {stage: _Sleeper(seconds, stage == last) for stage in schedule.stages[link.rank]}
    timelines = []
    for _ in range(1 + rounds):  # the first one warms up
        if group is not None:
            dist.barrier(group)
        walked = execute(schedule, stages, range(schedule.num_microbatches), link=link, boundary=BOUNDARY)
        timelines.append(gather_timeline(schedule, walked.spans, group, CPU))
    if group is not None:
        dist.barrier(group)
    disconnect(link)
    return timelines[1:]


def _price(schedule: Schedule, costs: Costs, slot: Slot) -> Price:
    """As the executor runs it: gradients leave before weights' are made, and a pair's backward goes first."""
    kind = _kind(schedule, slot)
    early = {"full B": (costs["W"],), "F&B": (0.0, costs["F&B"] - costs["B"])}
    return Price(costs[kind], early=early.get(kind, ()))


def _kind(schedule: Schedule, slot: Slot) -> str:
    if len(slot) > 1:
        return "F&B"
    (action,) = slot
    is_whole = action.kind == "B" and schedule.is_last(action)
    return "full B" if is_whole else action.kind
