"""What a schedule costs: a replay in which every slot takes its price. No torch.

A slot begins when its rank is free and what it needs has come. The price of a slot is a function, so
that made-up costs and measured ones are replayed alike.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields

from parallel.errors import UserError
from parallel.pipeline.action import Action, Schedule, Slot
from parallel.pipeline.order import possible_order
from parallel.pipeline.timeline import Span, Timeline


@dataclass(frozen=True)
class Price:
    """How long a slot takes, and how long of it nothing but the wire is busy.

    `early`: for each action, how long before the slot's end its result leaves; none: at the end.
    """

    seconds: float
    exposed: float = 0.0
    early: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the parts of a microbatch cost on one stage, in any unit.

    `b` is the whole backward, of which `w` is the weight gradients' part. `a2a` is all the all-to-all of
    a forward, and as much again of a backward: hidden by the partner's compute in a pair, else exposed.
    `p2p` is how long a result is on its way to the next stage.
    """

    f: float = 1.0
    b: float = 2.0
    w: float = 1.0
    a2a: float = 0.0
    p2p: float = 0.0

    def price(self, schedule: Schedule) -> Callable[[Slot], Price]:
        """The price of a schedule's slots. A pair takes as long as its compute or its traffic."""
        apart = schedule.apart

        def compute(action: Action) -> float:
            if action.kind == "B":
                return self.b - self.w if (action.microbatch, action.stage) in apart else self.b
            return self.f if action.kind == "F" else self.w

        def price(slot: Slot) -> Price:
            busy = sum(compute(action) for action in slot)
            wire = sum(self.a2a for action in slot if action.kind != "W")
            seconds = busy + wire if len(slot) == 1 else max(busy, wire)
            return Price(seconds, seconds - busy)

        return price


def parse_costs(text: str) -> Costs:
    """Read `f=1,b=2,w=1,a2a=0.6`; what is not named keeps its default. Raises UserError."""
    found = {}
    names = [field.name for field in fields(Costs)]
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+(?:\.\d*)?|\.\d+)\s*", part)
        if match is None or match[1] not in names:
            raise UserError(
                f"`--cost` must name {', '.join(names)} as in f=1,b=2,w=1,a2a=0.6, but has `{part}`"
            )
        found[match[1]] = float(match[2])
    costs = Costs(**found)
    if costs.w > costs.b:
        raise UserError(
            f"`--cost` w is a part of b and must not exceed it, but {costs.w:g} > {costs.b:g}: lower w"
        )
    return costs


def simulate(schedule: Schedule, price: Callable[[Slot], Price], p2p: float = 0.0) -> Timeline:
    """Replay a lawful schedule. `p2p`: how long a result travels from rank to rank."""
    ends: dict[Action, tuple[float, int]] = {}  # and the rank that ran it
    spans: list[list[Span]] = [[] for _ in schedule.slots]
    for rank, index in possible_order(schedule):
        slot, mine = schedule.slots[rank][index], spans[rank]
        made = [ends[source] for source in schedule.sources(slot)]
        arrivals = [end + (p2p if maker != rank else 0.0) for end, maker in made]
        begin = max([mine[-1].end if mine else 0.0, *arrivals])
        cost = price(slot)
        mine.append(Span(slot, begin, begin + cost.seconds, cost.exposed))
        for action, early in zip(slot, cost.early or (0.0,) * len(slot), strict=True):
            ends[action] = begin + cost.seconds - early, rank
    return Timeline(schedule, tuple(tuple(mine) for mine in spans))
