"""Running microbatches through this rank's stages: to train by the run's schedule, or forward alone."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from moe.config import LayoutConfig, RunConfig
from moe.model.transformer import Microbatch, Outcome, Transformer, positions_of
from parallel.collectives import barrier
from parallel.groups import Groups
from parallel.pipeline.action import Schedule
from parallel.pipeline.clock import Clock, gather_timeline
from parallel.pipeline.executor import execute
from parallel.pipeline.gpipe import forward_only
from parallel.pipeline.link import Boundary, connect, disconnect
from parallel.pipeline.schedules import FORMS, make
from parallel.pipeline.timeline import Timeline
from parallel.zero import Zero


class Runner:
    """This rank's stages, its place in the pipeline, and the buffers whose traffic its walk sets off."""

    def __init__(self, model: Transformer, config: RunConfig, groups: Groups, zero: Zero) -> None:
        self.model, self.groups, self.device = model, groups, zero.device
        self._zero, self._dtype = zero, next(model.parameters()).dtype
        self._layout, self._recompute = config.layout, config.train.recompute == "full"
        schedule = make_schedule(config.layout, config.layout.microbatches)
        self._link = connect(schedule, groups.pp, self.device)
        self._timed: tuple[Schedule, Clock] | None = None
        self._stages = dict(zip(sorted(schedule.stages[self._link.rank]), model.stages(), strict=True))

    def train(self, microbatches: Sequence[Microbatch], *, timed: bool = False) -> list[Outcome]:
        """Forward and backward; weights arrive when needed, reductions begin as gradients are whole.

        What is `timed` begins on all ranks of the pipeline at once.
        """
        awaited = Counter(unit for part in self.model.parts for unit in self.model.units(part))

        def leave(unit: str) -> None:
            awaited[unit] -= 1  # the embedding may be a unit of two stages
            if not awaited[unit]:
                self._zero.start_reduce(unit)

        schedule = make_schedule(self._layout, len(microbatches))
        if timed:
            barrier(self.groups.pp)
        walked = execute(
            schedule,
            self._stages,
            microbatches,
            link=self._link,
            boundary=self._boundary(microbatches),
            recompute=self._recompute,
            on_enter=self._zero.arrive,
            on_leave=leave,
        )
        if timed:
            self._timed = schedule, walked.clock
        return _by_microbatch(walked.returned)

    def timeline(self) -> Timeline | None:
        """When the ranks of this pipeline ran their slots in the last timed training. Every one must call."""
        if self._timed is None:
            return None
        schedule, clock = self._timed
        return gather_timeline(schedule, clock.spans(), self.groups.pp, self.device)

    def forward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Forward alone: nothing is recorded or moved."""
        walked = execute(
            _make_evaluation(self._layout, len(microbatches)),
            self._stages,
            microbatches,
            link=self._link,
            boundary=self._boundary(microbatches),
            on_enter=self._zero.arrive,
        )
        return _by_microbatch(walked.returned)

    def close(self) -> None:
        """Give the pipeline's connections back."""
        disconnect(self._link)

    def _boundary(self, microbatches: Sequence[Microbatch]) -> Boundary:
        shapes = []
        for microbatch in microbatches:
            size, length = microbatch.tokens.shape
            held = positions_of(length, self.groups)
            shapes.append((size, length // (held.cp * held.tp), self.model.config.hidden_size))
        return Boundary(shapes[0], self._dtype, self.device, tuple(shapes))


def _by_microbatch(returned: Mapping[tuple[int, int], Any]) -> list[Outcome]:
    """What all stages of this rank gave for each microbatch that they ran, in order."""
    found: dict[int, list[Outcome]] = defaultdict(list)
    for (microbatch, _), outcome in sorted(returned.items(), key=lambda pair: pair[0]):
        found[microbatch].append(outcome)
    return [
        replace(outcomes[-1], loads={name: load for each in outcomes for name, load in each.loads.items()})
        for outcomes in found.values()
    ]


@lru_cache(maxsize=8)
def make_schedule(layout: LayoutConfig, num_microbatches: int) -> Schedule:
    """The schedule that the settings name."""
    return make(
        layout.schedule,
        layout.pp,
        num_microbatches,
        overlap=layout.overlap,
        stages_per_rank=layout.stages_per_rank,
    )


@lru_cache(maxsize=8)
def _make_evaluation(layout: LayoutConfig, num_microbatches: int) -> Schedule:
    """Forwards alone, on the ranks that train these stages; of those that hold a stage twice, by one."""
    stages = make_schedule(layout, layout.microbatches).stages
    once = [held[:1] for held in stages] if FORMS[layout.schedule].both_ways else stages
    return forward_only(once, num_microbatches)
