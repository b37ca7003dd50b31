"""What every rank of a pipeline does, and in which order, as a value. No torch.

An *action* is the forward (F), the backward (B) or the weight gradients (W) of one microbatch on one
stage. Where a W is scheduled, its B makes the input gradients only; else B makes both. A rank walks
*slots*: a slot is one action, or a pair F&B that is stepped in turn, so that one computes while the
other's rows travel. A stage may be held by several ranks and a rank may hold several stages; who sends
what to whom follows from the actions alone (transfers.py). As text, in which `parse` reads a schedule
back:

    mine: 4 microbatches
    rank 0, stages 0 1: F0 F1 F2' F3'&B2' B0 B3' B1 W1
    rank 1, stages 1 0: F2' F3' F0 F1&B0 B2' B1 B3'

`F3'` is on the second of the rank's stages, `F3''` would be on a third one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from parallel.errors import UserError

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ACTION = re.compile(rf"([{''.join(KINDS)}])(\d+)('*)")
_PRIME = "'"
_HEADER = re.compile(r"(.+): (\d+) microbatches")
_LINE = re.compile(r"rank (\d+), stages ([\d ]+):(.*)")


@dataclass(frozen=True, order=True)
class Action:
    """The forward, the backward or the weight gradients of a microbatch on a stage."""

    kind: Kind
    microbatch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}@{self.stage}"


Slot = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """The stages that each rank holds, and each rank's slots in order."""

    name: str
    num_microbatches: int
    stages: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[Slot, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.stages)

    @cached_property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return 1 + max(stage for held in self.stages for stage in held)

    def actions(self, rank: int) -> Iterator[Action]:
        """A rank's actions one by one."""
        return (action for slot in self.slots[rank] for action in slot)

    @cached_property
    def apart(self) -> frozenset[tuple[int, int]]:
        """(microbatch, stage) whose weight gradients are an action of their own."""
        actions = (action for rank in range(self.num_ranks) for action in self.actions(rank))
        return frozenset((action.microbatch, action.stage) for action in actions if action.kind == "W")

    def is_last(self, action: Action) -> bool:
        """Whether nothing of its microbatch is left to do on its stage."""
        apart = (action.microbatch, action.stage) in self.apart
        return action.kind == ("W" if apart else "B")

    def source(self, action: Action) -> Action | None:
        """The neighbouring stage's action with whose result this one begins; None where it needs none."""
        if action.kind == "W":
            return None
        stage = action.stage - 1 if action.kind == "F" else action.stage + 1
        return Action(action.kind, action.microbatch, stage) if 0 <= stage < self.num_stages else None

    def sources(self, slot: Slot) -> list[Action]:
        """All that a slot needs from neighbouring stages before it begins."""
        return [source for action in slot if (source := self.source(action)) is not None]

    def serial(self) -> "Schedule":
        """The same order without pairs: the actions of each run one after the other."""
        slots = tuple(tuple((action,) for slot in mine for action in slot) for mine in self.slots)
        return replace(self, name=f"{self.name} serial", slots=slots)

    def words(self, rank: int) -> list[str]:
        """A rank's slots as text."""
        held = self.stages[rank]
        return ["&".join(_word(action, held) for action in slot) for slot in self.slots[rank]]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.num_microbatches} microbatches"]
        for rank, held in enumerate(self.stages):
            lines.append(
                f"rank {rank}, stages {' '.join(map(str, held))}: {' '.join(self.words(rank))}".rstrip()
            )
        return "\n".join(lines)


def written(
    name: str, num_microbatches: int, stages: Sequence[Sequence[int]], ranks: Sequence[Sequence[str]]
) -> Schedule:
    """A schedule from each rank's stages and its slots as words such as `F0`, `W0'` or `F1&B0`."""
    slots = tuple(
        tuple(_slot(word, held) for word in words) for held, words in zip(stages, ranks, strict=True)
    )
    return Schedule(name, num_microbatches, tuple(tuple(held) for held in stages), slots)


def one_stage_each(name: str, num_microbatches: int, ranks: Sequence[Sequence[str]]) -> Schedule:
    """A schedule in which rank r holds stage r."""
    return written(name, num_microbatches, [(rank,) for rank in range(len(ranks))], ranks)


def parse(text: str) -> Schedule:
    """Read a schedule's text. Raises UserError naming the line that is none."""
    header, *lines = text.strip().splitlines()
    found = _HEADER.fullmatch(header)
    if found is None:
        raise UserError(f"a schedule must begin like `1f1b: 8 microbatches`, but begins with `{header}`")
    stages, ranks = [], []
    for rank, line in enumerate(lines):
        parts = _LINE.fullmatch(line)
        if parts is None or int(parts[1]) != rank:
            raise UserError(
                f"a schedule's line {rank + 2} must begin with `rank {rank}, stages`, but is `{line}`"
            )
        stages.append([int(stage) for stage in parts[2].split()])
        ranks.append(parts[3].split())
    return written(found[1], int(found[2]), stages, ranks)


def _word(action: Action, held: Sequence[int]) -> str:
    return f"{action.kind}{action.microbatch}{_PRIME * held.index(action.stage)}"


def _slot(word: str, held: Sequence[int]) -> Slot:
    actions = []
    for part in word.split("&"):
        match = _ACTION.fullmatch(part)
        if match is None or len(match[3]) >= len(held):
            raise UserError(
                "a schedule's action must be written like `F0`, `F1&B0`, or `W0'` on the second of a rank's "
                f"stages, but is `{word}` on a rank with stages {' '.join(map(str, held))}"
            )
        kind = next(kind for kind in KINDS if kind == match[1])
        actions.append(Action(kind, int(match[2]), held[len(match[3])]))
    return tuple(actions)
