"""The cases that `switchyard verify` proves: a layout, how its schedule runs, and recomputation. No torch.

Every layout of a number of ranks meets every schedule that it can run; recomputation alternates from
case to case, so that each schedule meets it on every axis without doubling the work.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from moe.config import LayoutConfig, RunConfig, ScheduleName
from moe.rules import validate
from parallel.errors import UserError
from parallel.layout import Layout, divisors
from parallel.pipeline.schedules import FORMS

Recompute = Literal["none", "full"]
RECOMPUTE: tuple[Recompute, Recompute] = ("none", "full")
SCHEDULES: dict[bool, tuple[tuple[ScheduleName, bool], ...]] = {  # and `layout.overlap`
    False: (("1f1b", True), ("1f1b", False)),  # one stage: only the overlap makes a difference
    True: (
        *(("1f1b", True), ("1f1b", False), ("gpipe", False), ("zb-h1", False), ("interleaved", False)),
        *(("dualpipe", True), ("dualpipe", False), ("dualpipev", True)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What differs from case to case; `layout.dp` is a number."""

    layout: LayoutConfig
    recompute: Recompute
    node: int | None = None  # ranks of a node, where rows make two hops

    @property
    def degrees(self) -> Layout:
        """The layout without how it is scheduled."""
        config = self.layout
        assert config.dp is not None
        return Layout(
            tp=config.tp,
            cp=config.cp,
            dp=config.dp,
            pp=config.pp,
            ep=config.ep,
            etp=config.etp,
            both_ways=FORMS[config.schedule].both_ways,
            node=self.node,
        )

    @property
    def parts(self) -> int:
        """Microbatches of the global batch, which one rank must cut alike."""
        return self.degrees.dp * self.layout.microbatches

    @property
    def schedule(self) -> str:
        """The order of the work, as in ``1f1b overlap``; without stages ``overlap`` or ``serial``."""
        name, overlap = self.layout.schedule, self.layout.overlap
        words = [name, "overlap"] if FORMS[name].overlaps and overlap else [str(name)]
        if self.layout.pp == 1:
            words = ["overlap" if overlap else "serial"]
        return " ".join(words + ["two-hop"] * (self.node is not None))

    def describe(self) -> str:
        """The case in words."""
        return f"{self.degrees.describe()}, {self.schedule}, recompute {self.recompute}"

    def config(self, base: RunConfig) -> RunConfig:
        """A run's settings with this layout and recomputation."""
        config = replace(base, layout=self.layout, train=replace(base.train, recompute=self.recompute))
        if self.node is None:
            return config
        return replace(config, cluster=replace(base.cluster, gpus_per_node=self.node))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be proven, as one process decides it and every rank reads it."""

    config: RunConfig
    cases: tuple[Case, ...]
    ranks: int
    steps: int
    notes: tuple[str, ...]  # to be printed first
    json: str | None  # a file


def single(config: RunConfig, world_size: int | None) -> Case:
    """The recipe's own layout; `world_size` None starts the fewest ranks that hold it."""
    layout = validate(config, world_size)
    if not _drops_alike(config, layout):
        raise UserError(
            "`model.capacity_factor` must be null where `layout.tp` or `layout.cp` cut sequences, but is "
            f"{config.model.capacity_factor}: set it to null, since no such layout can equal one rank where "
            "each rank drops from the tokens it holds"
        )
    wanted = replace(config.layout, dp=layout.dp)
    return Case(layout=wanted, recompute=config.train.recompute, node=layout.node)


def sweep(config: RunConfig, world_size: int, *, full: bool) -> tuple[list[Case], dict[str, int]]:
    """Cases of every layout that takes exactly this many ranks, and how many were left out and why.

    `full`: every schedule with and without recomputation. Microbatches are lowered where the batch
    asks for it, and raised where a schedule does.
    """
    validate(replace(config, layout=LayoutConfig()))  # what fails here is no matter of the layout
    cases: list[Case] = []
    left_out = {
        "what does not divide this model, its sequences or its batch": 0,
        "tp or cp under `model.capacity_factor`, where what is dropped depends on who holds which token": 0,
    }
    indivisible, dropping = left_out
    number = 0
    for layout in layouts(world_size):
        found = list(_cases(config, layout, number, full))
        if not found:
            left_out[indivisible] += 1
        elif not _drops_alike(config, layout):
            left_out[dropping] += 1
        else:
            cases += found
            number += 1
    return cases, {reason: count for reason, count in left_out.items() if count}


def layouts(world_size: int) -> Iterator[Layout]:
    """Every layout of exactly this many ranks."""
    for tp in divisors(world_size):
        for cp in divisors(world_size // tp):
            for pp in divisors(world_size // (tp * cp)):
                stage = world_size // pp
                for etp in divisors(stage):
                    for ep in divisors(stage // etp):
                        yield Layout(tp=tp, cp=cp, dp=stage // (tp * cp), pp=pp, ep=ep, etp=etp)


def _cases(config: RunConfig, layout: Layout, number: int, full: bool) -> Iterator[Case]:
    for index, (schedule, overlap) in enumerate(SCHEDULES[layout.pp > 1]):
        fitted = _fit(config, LayoutConfig(**layout.degrees, schedule=schedule, overlap=overlap))
        if fitted is not None:
            for recompute in RECOMPUTE if full else (RECOMPUTE[(number + index) % 2],):
                yield Case(layout=fitted, recompute=recompute)
    if layout.ep % 2 == 0 and layout.ep > 2:  # two nodes, of several ranks each
        node = layout.ep * layout.etp // 2
        near = replace(config, cluster=replace(config.cluster, gpus_per_node=node))
        fitted = _fit(near, LayoutConfig(**layout.degrees, dispatch="two_hop"))
        if fitted is not None:
            for recompute in RECOMPUTE if full else (RECOMPUTE[number % 2],):
                yield Case(layout=fitted, recompute=recompute, node=node)


def _fit(config: RunConfig, layout: LayoutConfig) -> LayoutConfig | None:
    """A layout with as many microbatches as the recipe has, else fewer, else more; None if none fit."""
    assert layout.dp is not None
    share, left = divmod(config.train.batch_size, layout.dp)
    if left or not share:
        return None
    wanted = config.layout.microbatches
    for count in sorted(divisors(share), key=lambda count: (count > wanted, abs(count - wanted))):
        fitted = replace(layout, microbatches=count)
        with suppress(UserError):
            validate(replace(config, layout=fitted))
            return fitted
    return None


def _drops_alike(config: RunConfig, layout: Layout) -> bool:
    return config.model.capacity_factor is None or layout.tp * layout.cp == 1
