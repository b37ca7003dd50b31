"""The degrees of parallelism of a run, the rules they obey, and where a rank stands. No torch.

Ranks stand in two grids at once (Parallel Folding), whose first axis varies fastest:

    attention   [tp, cp, dp, pp]          experts   [etp, ep, expert_dp, pp]

A pipeline stage is `tp x cp x dp` neighbouring ranks, and the same ranks are `etp x ep x expert_dp`.
With tensor parallelism the sequence is cut over `tp` too, so that every rank of a stage holds
distinct tokens. TP, ETP and EP groups are runs of neighbours, inside a node wherever one is large enough.
Where rows make two hops, EP is two axes, `ep_node` within a node and `ep_rail` across nodes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parallel.errors import UserError

_ATTENTION = ("tp", "cp", "dp", "pp")
DEGREES = ("tp", "cp", "dp", "pp", "ep", "etp")
_EXPERTS = ("etp", "ep", "expert_dp", "pp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of tensor, context, data and pipeline parallelism; experts over `ep`, each over `etp`.

    `both_ways`: pipeline rank r holds what rank pp - 1 - r, its mirror, holds too. `node`: ranks of a node,
    of which an expert group covers several that a row enters once each; None lets rows go straight.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    both_ways: bool = False
    node: int | None = None

    def __post_init__(self) -> None:
        for name in DEGREES:
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"`layout.{name}` must be at least 1, but is {value}: use 1 or more")
        if self.stage_size % self.etp:
            raise UserError(
                "`layout.etp` must divide `layout.tp` x `layout.cp` x `layout.dp`, but "
                f"{self.etp} does not divide {self.stage_size}: use {alternatives(self.stage_size, self.etp)}"
            )
        if self.stage_size % (self.ep * self.etp):
            left = self.stage_size // self.etp
            raise UserError(
                "`layout.ep` must divide `layout.tp` x `layout.cp` x `layout.dp` / `layout.etp`, but "
                f"{self.ep} does not divide {left}: use {alternatives(left, self.ep)}"
            )
        if self.node is not None:
            assert self.node % self.etp == 0 and self.ep % self.ep_node == 0 and self.ep_rail > 1

    @property
    def degrees(self) -> dict[str, Any]:
        """The axes' degrees by name."""
        return {axis: getattr(self, axis) for axis in DEGREES}

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage; each holds distinct tokens."""
        return self.tp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.stage_size * self.pp

    @property
    def expert_dp(self) -> int:
        """Ranks of a stage that hold the same part of the same experts."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def ep_node(self) -> int:
        """Ranks of an expert group that a row reaches in one hop: those of a node, or all."""
        return self.ep if self.node is None else self.node // self.etp

    @property
    def ep_rail(self) -> int:
        """Nodes that an expert group covers where rows make two hops, else 1."""
        return self.ep // self.ep_node

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a global rank stands along each axis of both grids."""
        place = {**self._place(_EXPERTS, rank), **self._place(_ATTENTION, rank)}
        rail, node = divmod(place["ep"], self.ep_node)
        return {**place, "ep_node": node, "ep_rail": rail}

    def _place(self, axes: tuple[str, ...], rank: int) -> dict[str, int]:
        place = {}
        for axis in axes:
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    def describe(self) -> str:
        """The axes larger than one, as in ``tp2·pp2·ep4``; ``one rank`` where there is none."""
        axes = [(axis, getattr(self, axis)) for axis in ("tp", "cp", "pp", "dp", "ep", "etp")]
        return "·".join(f"{axis}{degree}" for axis, degree in axes if degree > 1) or "one rank"

    def across_nodes(self, ranks_per_node: int) -> Iterator[str]:
        """A sentence for each of TP, ETP and EP whose groups do not fit into nodes of this many ranks."""
        for axes in (("tp",), ("etp",), ("etp", "ep")):
            axis, size = axes[-1], math.prod(getattr(self, name) for name in axes)
            nodes = {
                (first // ranks_per_node, (first + size - 1) // ranks_per_node)
                for first in range(0, self.world_size, size)
            }
            widest = max(last - first + 1 for first, last in nodes)
            if getattr(self, axis) > 1 and widest > 1 and (axis != "ep" or self.node is None):
                yield (
                    f"`layout.{axis}` groups of {size} ranks reach over {widest} nodes of {ranks_per_node}: "
                    f"their exchanges leave the fast links inside a node"
                )


def length_multiple(cp: int, tp: int) -> int:
    """Every sequence's length must be a multiple of this."""
    return tp if cp == 1 else 2 * cp * tp


def divisors(number: int) -> list[int]:
    """Every positive divisor of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def alternatives(number: int, wrong: int) -> str:
    """The three divisors of `number` nearest to `wrong`, as words: ``2, 4 or 6``."""
    near = sorted(sorted(divisors(number), key=lambda d: abs(d - wrong))[:3])
    words = [str(d) for d in near]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
