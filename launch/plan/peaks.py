"""The most that activations take on a rank: a walk through its slots, phase by phase. No torch.

A forward piles up what its phases keep. A backward takes it away from the end, and needs for a while
what it computes with; recomputation adds what a phase keeps inside, and its outputs once more. Weight
gradients are put off where there is a wire to wait for. Of a pair one computes while the other stands
still, from wire to wire.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.plan.activations import Phase
from parallel.pipeline.action import Action, Schedule

# From one wait for the wire to the next, beside what is held before: the most bytes, and those at its end.
Curve = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Stage:
    """A microbatch on a stage: what it keeps, and what its parts take while they run."""

    kept: int
    by_phase: Mapping[str, int]  # the same, by the phases' names
    rows: int  # of that, what exchanges sent and received
    waiting: int  # what weight gradients that are put off keep
    forward: Curve
    backward: Curve
    backward_apart: Curve  # where weight gradients are an action of their own
    weights: int


@dataclass(frozen=True)
class Peak:
    """The greatest sum on a rank, in bytes, and how much of it is exchanged rows, as in what is kept."""

    bytes: int = 0
    rows: int = 0
    in_flight: int = 0


def stage_of(phases: Sequence[Phase], *, recompute: bool) -> Stage:
    """Sum up a stage's phases."""
    kept = [phase.outputs + (0 if recompute else phase.inside) for phase in phases]
    by_phase: Counter[str] = Counter()
    for phase, stays in zip(phases, kept, strict=True):
        by_phase[phase.name] += stays
    return Stage(
        kept=sum(kept),
        by_phase=by_phase,
        rows=sum(phase.outputs for phase in phases if phase.is_exchange),
        waiting=sum(phase.rows + phase.grads for phase in phases),
        forward=_forward(phases, kept),
        backward=_backward(phases, kept, recompute=recompute, apart=False),
        backward_apart=_backward(phases, kept, recompute=recompute, apart=True),
        weights=max(phase.weights for phase in phases),
    )


def _forward(phases: Sequence[Phase], kept: Sequence[int]) -> Curve:
    curve, held, most = [], 0, 0
    for phase, stays in zip(phases, kept, strict=True):
        if phase.wire:
            curve.append((most, held))
            most = 0
        most = max(most, held + phase.outputs + phase.inside + phase.forward)
        held += stays
    return [*curve, (most, held)]


def _backward(phases: Sequence[Phase], kept: Sequence[int], *, recompute: bool, apart: bool) -> Curve:
    curve, held, most, put_off, left, weights = [], 0, 0, 0, 0, 0
    at_once = not apart and not any(phase.wire for phase in phases)  # as parallel/pipeline/tape.py has it
    for phase, stays in zip(reversed(phases), reversed(kept), strict=True):
        again = _again(phase) if recompute else 0
        needed = max(phase.backward, phase.forward if recompute else 0)
        if at_once:
            needed = max(needed, phase.grads + phase.weights)
        most = max(most, held + put_off + again + needed)
        held -= stays
        put_off += 0 if at_once else phase.rows + phase.grads
        weights = max(weights, phase.weights)
        if not apart and (phase.wire or (phase.begins_unit and left)):
            most = max(most, held + put_off + weights)
            put_off, weights, left = 0, 0, 0
        left += phase.begins_unit
        if phase.wire:
            still = held + put_off + phase.wire
            curve.append((max(most, still), still))
            most = still - phase.wire
    return [*curve, (most, held + put_off)]


def _again(phase: Phase) -> int:
    """What recomputation makes a second time; rows that came are not sent again."""
    return phase.inside + (0 if phase.is_exchange else phase.outputs)


def peak(schedule: Schedule, rank: int, stages: Mapping[int, Stage]) -> Peak:
    """Walk one rank of a pipeline."""
    held, most = 0, Peak()
    flights: Counter[int] = Counter()
    for slot in schedule.slots[rank]:
        backward_first = sorted(slot, key=lambda action: action.kind)
        taken = _together([_curve(schedule, action, stages[action.stage]) for action in backward_first])
        for action in slot:
            flights[action.stage] += action.kind == "F"
        if held + taken > most.bytes:
            kept = sum(count * stages[stage].kept for stage, count in flights.items())
            rows = sum(count * stages[stage].rows for stage, count in flights.items())
            most = Peak(held + taken, (held + taken) * rows // max(1, kept), flights.total())
        for action in slot:
            stage = stages[action.stage]
            apart = (action.microbatch, action.stage) in schedule.apart
            flights[action.stage] -= action.kind == "B"
            held += {"F": stage.kept, "B": (stage.waiting if apart else 0) - stage.kept, "W": -stage.waiting}[
                action.kind
            ]
    assert held == 0, f"{held} bytes are left"
    return most


def _together(curves: Sequence[Curve]) -> int:
    """The most that actions take which are stepped in turn, the first one first."""
    still, most = [0] * len(curves), 0
    for step in range(max(map(len, curves))):
        for side, curve in enumerate(curves):
            if step < len(curve):
                others = sum(still) - still[side]
                most, still[side] = max(most, others + curve[step][0]), curve[step][1]
    return most


def _curve(schedule: Schedule, action: Action, stage: Stage) -> Curve:
    if action.kind == "W":
        return [(stage.weights, 0)]
    if action.kind == "F":
        return stage.forward
    return stage.backward_apart if (action.microbatch, action.stage) in schedule.apart else stage.backward
