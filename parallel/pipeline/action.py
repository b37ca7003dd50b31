"""What every rank of a pipeline does, and in which order, as a value. No torch.

An *action* is the forward (F) or the backward (B) of one microbatch on one stage. A rank walks *slots*:
a slot is one action, or a pair that is stepped in turn, so that one computes while the other's rows
travel. A stage may be held by several ranks and a rank may hold several stages; who sends what to whom
follows from the actions alone (transfers.py). As text, in which `parse` reads a schedule back:

    1f1b: 3 microbatches
    rank 0, stages 0: F0 F1 B0 F2 B1 B2
    rank 1, stages 1: F0 B0 F1 B1 F2 B2

`F1&B0` is a pair. On a rank with several stages every action names its own: `F1@4`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from parallel.errors import UserError

Kind = Literal["F", "B"]
_ACTION = re.compile(rf"([{''.join(get_args(Kind))}])(\d+)(?:@(\d+))?")
_HEADER = re.compile(r"(.+): (\d+) microbatches")
_LINE = re.compile(r"rank (\d+), stages ([\d ]+):(.*)")


@dataclass(frozen=True, order=True)
class Action:
    """The forward or the backward of a microbatch on a stage."""

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

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return 1 + max(stage for held in self.stages for stage in held)

    def actions(self, rank: int) -> Iterator[Action]:
        """A rank's actions one by one."""
        return (action for slot in self.slots[rank] for action in slot)

    def source(self, action: Action) -> Action | None:
        """The neighbouring stage's action with whose result this one begins; None at the pipeline's ends."""
        stage = action.stage - 1 if action.kind == "F" else action.stage + 1
        return replace(action, stage=stage) if 0 <= stage < self.num_stages else None

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.num_microbatches} microbatches"]
        for rank, (held, slots) in enumerate(zip(self.stages, self.slots, strict=True)):
            words = ["&".join(_short(action, held) for action in slot) for slot in slots]
            lines.append(f"rank {rank}, stages {' '.join(map(str, held))}: {' '.join(words)}".rstrip())
        return "\n".join(lines)


def one_stage_each(name: str, num_microbatches: int, ranks: Sequence[Sequence[str]]) -> Schedule:
    """A schedule in which rank r holds stage r, from each rank's slots as words such as `F0` or `F1&B0`."""
    stages = tuple((rank,) for rank in range(len(ranks)))
    slots = tuple(tuple(_slot(word, (rank,)) for word in words) for rank, words in enumerate(ranks))
    return Schedule(name, num_microbatches, stages, slots)


def parse(text: str) -> Schedule:
    """Read a schedule's text. Raises UserError naming the line that is none."""
    header, *lines = text.strip().splitlines()
    found = _HEADER.fullmatch(header)
    if found is None:
        raise UserError(f"a schedule must begin like `1f1b: 8 microbatches`, but begins with `{header}`")
    stages, slots = [], []
    for rank, line in enumerate(lines):
        parts = _LINE.fullmatch(line)
        if parts is None or int(parts[1]) != rank:
            raise UserError(
                f"a schedule's line {rank + 2} must begin with `rank {rank}, stages`, but is `{line}`"
            )
        held = tuple(int(stage) for stage in parts[2].split())
        stages.append(held)
        slots.append(tuple(_slot(word, held) for word in parts[3].split()))
    return Schedule(found[1], int(found[2]), tuple(stages), tuple(slots))


def _short(action: Action, held: tuple[int, ...]) -> str:
    return str(action).partition("@")[0] if held == (action.stage,) else str(action)


def _slot(word: str, held: tuple[int, ...]) -> Slot:
    found = [_ACTION.fullmatch(part) for part in word.split("&")]
    actions = []
    for match in found:
        if match is None or (match[3] is None and len(held) > 1):
            raise UserError(
                f"a schedule's action must be written like `F0`, `F1&B0`, or `F0@2` on a rank with several "
                f"stages, but is `{word}`"
            )
        kind: Kind = "F" if match[1] == "F" else "B"
        actions.append(Action(kind, int(match[2]), held[0] if match[3] is None else int(match[3])))
    return tuple(actions)
