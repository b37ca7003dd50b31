"""What holds a stage's weights: runs microbatches through it, sums their gradients and moves it.

`Switchyard` is the house's own, for every layout; `DeepSpeed` (deepspeed.py) trades speed for memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, get_args

import torch

from moe.components import component_of
from moe.config import Component, RunConfig
from moe.model.transformer import Microbatch, Outcome, Transformer
from moe.train.optim import DTYPES, Optimizer
from moe.train.runner import Runner
from moe.train.units import parameter_units
from parallel.groups import Groups
from parallel.pipeline.timeline import Timeline
from parallel.shards import Piece, pieces
from parallel.zero import Zero

KINDS = ("model", *get_args(Component))  # of what a gradient is clipped by itself


class Engine(Protocol):
    """One rank's part. Every rank calls the same methods in the same order."""

    model: Transformer
    groups: Groups
    device: torch.device

    def train(self, microbatches: Sequence[Microbatch], *, timed: bool = False) -> list[Outcome]:
        """Forward and backward of this rank's microbatches of a step; what came before is forgotten."""
        ...

    def timeline(self) -> Timeline | None:
        """When the ranks of this pipeline did what in the last training that was `timed`."""
        ...

    def update(self, rate: float) -> float:
        """Clip the gradients and move the weights at this rate; the whole gradient's norm before that."""
        ...

    def forward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Losses or logits of microbatches, without gradients."""
        ...

    def owned(self) -> Iterator[Piece]:
        """This rank's part of weights, moments and, where weights are not fp32, masters.

        What the weights follow from is views that can be written.
        """
        ...

    def written(self, steps: int) -> None:
        """Take up what was written into the pieces: the state after so many steps."""
        ...


class Switchyard:
    """Schedules, overlap and ZeRO-1 of this house."""

    def __init__(self, model: Transformer, config: RunConfig, groups: Groups, device: torch.device) -> None:
        self.model, self.groups, self.device = model.to(device), groups, device
        self.zero = Zero(
            parameter_units(model, groups),
            groups.world,
            reduce_dtype=DTYPES[config.optim.grad_reduce],
        )
        self._optimizer = Optimizer(self.zero.segments(), config.optim)
        self._runner = Runner(model, config, groups, self.zero)
        self._clip_norm = config.optim.clip_norm
        self._kind_of = component_of if config.optim.clip == "component" else _whole_model

    def train(self, microbatches: Sequence[Microbatch], *, timed: bool = False) -> list[Outcome]:
        """Forward and backward as the schedule says; gradients are summed as their units are complete."""
        self.zero.clear()
        outcomes = self._runner.train(microbatches, timed=timed)
        self.zero.finish_reduce()
        return outcomes

    def timeline(self) -> Timeline | None:
        """When the ranks of this pipeline ran their slots in the last timed training."""
        return self._runner.timeline()

    def update(self, rate: float) -> float:
        """Move the masters; weights that are not here yet arrive as the next forward asks for them."""
        norms = self.zero.norms(KINDS, self._kind_of)
        over = {kind: self._clip_norm / norm for kind, norm in norms.items() if 0 < self._clip_norm < norm}
        for segment in self.zero.segments() if over else ():
            segment.grad.mul_(over.get(self._kind_of(segment.name), 1.0))
        self._optimizer.step(rate)
        self.zero.start_gather()
        return math.hypot(*norms.values())

    def forward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Losses or logits of microbatches, without gradients."""
        return self._runner.forward(microbatches)

    def close(self) -> None:
        """Wait for what is on its way and give connections back: another layout may follow on these ranks."""
        self.zero.arrive_all()
        self._runner.close()

    def owned(self) -> Iterator[Piece]:
        """Views of the owned shards."""
        self.zero.arrive_all()
        for segment in self.zero.segments():
            yield from pieces(f"model/{segment.name}", segment.parameter, segment.weight, segment.begin)
        yield from self._optimizer.state()

    def written(self, steps: int) -> None:
        """Share the weights that the masters stand for."""
        self.zero.start_gather()
        self.zero.arrive_all()
        self._optimizer.set_steps(steps)


def _whole_model(name: str) -> str:
    return "model"
