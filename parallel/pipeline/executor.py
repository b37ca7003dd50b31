"""One rank's walk through a schedule: any schedule, any stages, training and evaluation.

A forward is a generator: it takes its hidden states, runs the stage's phases on a tape and hands on the
result. A backward takes its gradient, walks that tape and hands on the gradient of what the forward took.
A pair is two generators stepped in turn. Who sends what to whom follows from the schedule
(transfers.py); link.py says why nobody waits for ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.pipeline.action import Action, Schedule
from parallel.pipeline.link import Boundary, Link, Mail
from parallel.pipeline.overlap import run_pair
from parallel.pipeline.tape import Direct, OnUnit, Recorder, Steps, Tape, run


class Stage(Protocol):
    """A consecutive part of a model."""

    def phases(self, tape: Recorder, microbatch: Any, hidden: Tensor | None) -> Steps:
        """Run a microbatch; return (hidden states for the next stage, anything for the caller).

        `hidden` is what the stage before made, None on the first stage. The last stage makes no hidden
        states, and its losses are roots of the tape.
        """
        ...


def execute(
    schedule: Schedule,
    stages: Mapping[int, Stage],
    microbatches: Sequence[Any],
    *,
    link: Link,
    boundary: Boundary,
    recompute: bool = False,
    on_enter: OnUnit | None = None,
    on_leave: OnUnit | None = None,
) -> list[Any]:
    """Walk this rank's slots; return what its stages had for the caller, by microbatch, then by stage.

    `stages` are this rank's, by number. `on_enter` hears of every unit that a forward enters, `on_leave`
    of every unit whose gradients are whole: in the last backward of its stage. A schedule without
    backwards records nothing. What a stage raises is raised here, without waiting for any other rank.
    """
    assert len(microbatches) == schedule.num_microbatches
    actions = list(schedule.actions(link.rank))
    last = set({action.stage: action for action in actions if action.kind == "B"}.values())

    def recorder(microbatch: int, stage: int) -> Tape | Direct:
        if not last:
            return Direct(on_enter)
        leaving = on_leave if Action("B", microbatch, stage) in last else None
        return Tape(recompute=recompute, on_enter=on_enter, on_leave=leaving)

    walk = _Walk(schedule, stages, microbatches, Mail(schedule, link, boundary), recorder)
    with torch.set_grad_enabled(bool(last)):
        for index, slot in enumerate(schedule.slots[link.rank]):
            walk.mail.put_up(index)
            steps = [walk.steps(action) for action in slot]
            if len(steps) == 1:
                run(steps[0])
            else:
                run_pair(*steps)
        walk.mail.finish()
    return [walk.returned[key] for key in sorted(walk.returned)]


@dataclass(frozen=True)
class _Flight:
    """A microbatch on a stage, between its forward and its backward."""

    tape: Tape
    taken: Tensor | None
    made: Tensor | None


class _Walk:
    """The state of one call of `execute`."""

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        microbatches: Sequence[Any],
        mail: Mail,
        recorder: Callable[[int, int], Tape | Direct],
    ) -> None:
        self._schedule, self._stages, self._microbatches = schedule, stages, microbatches
        self._recorder = recorder
        self.mail = mail
        self.returned: dict[tuple[int, int], Any] = {}  # by (microbatch, stage)
        self._flights: dict[tuple[int, int], _Flight] = {}

    def steps(self, action: Action) -> Steps:
        """The generator of an action."""
        return self._forward(action) if action.kind == "F" else self._backward(action)

    def _forward(self, action: Action) -> Steps:
        key, source = (action.microbatch, action.stage), self._schedule.source(action)
        tape = self._recorder(*key)
        taken = None if source is None else self.mail.take(source)
        if taken is not None and isinstance(tape, Tape):
            taken.requires_grad_()
        phases = self._stages[action.stage].phases(tape, self._microbatches[action.microbatch], taken)
        made, self.returned[key] = yield from phases
        if isinstance(tape, Tape):
            self._flights[key] = _Flight(tape, taken, made)
        if action.stage + 1 < self._schedule.num_stages:
            self.mail.send(action, made.detach())

    def _backward(self, action: Action) -> Steps:
        flight, source = self._flights.pop((action.microbatch, action.stage)), self._schedule.source(action)
        if source is not None:
            assert flight.made is not None
            flight.tape.root(flight.made, self.mail.take(source))
        yield from flight.tape.backward()
        taken = flight.taken
        if taken is not None:
            self.mail.send(action, torch.zeros_like(taken) if taken.grad is None else taken.grad)
