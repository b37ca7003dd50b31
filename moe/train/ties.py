"""Whom a router chooses where rounding decides: two runs that are to be compared must choose alike.

Experts are chosen by a step function of scores. Of thousands of choices some lie so near a step that
another order of adding tips them, and an expert's gradient then differs by a percent although nothing
is wrong. So one run records its scores and choices, and another follows it wherever its own scores,
expert by expert, are the same within a bound: there a different choice can only be a tie. Where its
scores differ it chooses for itself, and the difference shows.
Legend: T tokens, E experts, K chosen experts, B sequences, S positions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from moe.model.transformer import Transformer, positions_of
from parallel.groups import Groups

METHODS = ("choose", "unbiased_choice")  # of a router: for the experts, and for the auxiliary losses

Tap = Callable[[str, Tensor, Tensor], Tensor]


def tap(model: Transformer, through: Tap) -> None:
    """Let every choice of a model pass `through(key, scores [T, E], experts [T, K])`, whose word it is."""
    for name, router in model.routers():
        for method in METHODS:
            setattr(router, method, partial(_tapped, f"{name}/{method}", getattr(router, method), through))


@torch.no_grad()
def _tapped(key: str, choose: Callable[[Tensor], Tensor], through: Tap, scores: Tensor) -> Tensor:
    experts = choose(scores)
    return through(key, scores.flatten(0, -2), experts.flatten(0, -2)).view_as(experts)


class Recording:
    """Notes the choices of a step, microbatch by microbatch."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def __call__(self, key: str, scores: Tensor, experts: Tensor) -> Tensor:
        """A `Tap`: nothing is replaced."""
        microbatch = self._calls[key] = self._calls.get(key, -1) + 1
        self._tensors[f"{key}/{microbatch}/scores"] = scores.clone()
        self._tensors[f"{key}/{microbatch}/experts"] = experts.clone()
        return experts

    def take(self) -> dict[str, Tensor]:
        """Scores [T, E] and experts [T, K] since the last call, as `LAYER/METHOD/MICROBATCH/KIND`."""
        taken, self._tensors, self._calls = self._tensors, {}, {}
        return taken


class Following:
    """Takes the recorded choice for tokens whose scores are the recorded ones within a bound."""

    def __init__(self, groups: Groups, microbatches: Sequence[int], sequence_length: int) -> None:
        """`microbatches`: the numbers of this rank's among those of the recorded global batch."""
        self._microbatches, self._length = microbatches, sequence_length
        self._positions = positions_of(sequence_length, groups)
        self._recorded: Mapping[str, Tensor] = {}
        self._bound = 0.0
        self._ties: dict[tuple[str, int], int] = {}

    def begin(self, recorded: Mapping[str, Tensor], bound: float) -> None:
        """Follow this recording from here on."""
        self._recorded, self._bound, self._ties = recorded, bound, {}

    def __call__(self, key: str, scores: Tensor, experts: Tensor) -> Tensor:
        """A `Tap`. The microbatch is told by its scores: schedules and recomputation mix their order."""
        distances = {
            number: (scores - self._own(f"{key}/{number}/scores", scores)).abs()
            for number in self._microbatches
        }
        nearest = min(distances, key=lambda number: float(distances[number].mean()))
        same = distances[nearest].amax(1) <= self._bound
        expected = self._own(f"{key}/{nearest}/experts", experts)
        taken = torch.where(same[:, None], expected, experts)
        tied = (taken.sort(1).values != experts.sort(1).values).any(1)
        self._ties[key, nearest] = int(tied.sum())  # assigned: recomputation comes twice
        return taken

    @property
    def ties(self) -> int:
        """How many choices were another's since `begin`, of this rank's tokens."""
        return sum(self._ties.values())

    def _own(self, name: str, like: Tensor) -> Tensor:
        """What was recorded for this rank's positions."""
        whole = self._recorded[name].to(like.device).unflatten(0, (-1, self._length))
        return self._positions.sequence(whole).flatten(0, 1)
