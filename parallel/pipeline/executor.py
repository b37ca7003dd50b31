"""One rank's walk through a schedule: any schedule, any stages, training and evaluation.

A forward is a generator: it takes its hidden states, runs the stage's phases on a tape and hands on the
result. A backward takes its gradient, walks that tape and hands on the gradient of what the forward took;
weight gradients that are scheduled apart it leaves on the tape. A pair is two generators stepped in
turn. A slot begins when all that it needs is here, which is what its measured span begins with. Who
sends what to whom follows from the schedule (transfers.py); link.py says why nobody waits for ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.pipeline.action import Action, Schedule, Slot
from parallel.pipeline.clock import Clock
from parallel.pipeline.link import Boundary, Link, Mail
from parallel.pipeline.overlap import run_pair
from parallel.pipeline.tape import Direct, OnUnit, Recorder, Steps, Tape, run
from parallel.pipeline.timeline import Span


class Stage(Protocol):
    """A consecutive part of a model."""

    def phases(self, tape: Recorder, microbatch: Any, hidden: Tensor | None) -> Steps:
        """Run a microbatch; return (hidden states for the next stage, anything for the caller).

        `hidden` is what the stage before made, None on the first stage. The last stage makes no hidden
        states, and its losses are roots of the tape.
        """
        ...


@dataclass(frozen=True)
class Walked:
    """What one walk gave: what the stages had for the caller, by (microbatch, stage), and when."""

    returned: Mapping[tuple[int, int], Any]
    clock: Clock

    @property
    def spans(self) -> Sequence[Span]:
        """When this rank's slots ran, in seconds since its walk began. On CUDA this waits for the device."""
        return self.clock.spans()


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
) -> Walked:
    """Walk this rank's slots.

    `stages` are this rank's, by number. `on_enter` hears of every unit that a forward enters, `on_leave`
    of every unit whose gradients are whole: once for each stage that has it, when the stage's last ones
    are made. A schedule without backwards records nothing. What a stage raises is raised here, without
    waiting for any other rank.
    """
    assert len(microbatches) == schedule.num_microbatches
    ends = {action.stage: action for action in schedule.actions(link.rank) if schedule.is_last(action)}

    def recorder(microbatch: int, stage: int) -> Tape | Direct:
        if not ends:
            return Direct(on_enter)
        end = ends[stage]
        return Tape(
            recompute=recompute,
            on_enter=on_enter,
            on_leave=on_leave if end.microbatch == microbatch else None,
        )

    walk = _Walk(schedule, stages, microbatches, Mail(schedule, link, boundary), recorder)
    clock = Clock(boundary.device)
    with torch.set_grad_enabled(bool(ends)):
        for index, slot in enumerate(schedule.slots[link.rank]):
            walk.run(index, slot, clock)
        walk.mail.finish()
    return Walked(walk.returned, clock)


@dataclass(frozen=True)
class _Flight:
    """A microbatch on a stage, between its forward and its backward."""

    tape: Tape
    taken: Tensor | None
    made: Tensor | None


def _backward_first(pair: tuple[Action, Steps]) -> str:
    return pair[0].kind


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
        self._apart: dict[tuple[int, int], Tape] = {}  # whose weight gradients are to be made

    def run(self, index: int, slot: Slot, clock: Clock) -> None:
        """Run a slot when all that it needs is here."""
        self.mail.put_up(index)
        sources = [self._schedule.source(action) for action in slot]
        inputs = [None if source is None else self.mail.take(source) for source in sources]
        begin = clock.begin(slot)
        steps = [self._steps(action, value) for action, value in zip(slot, inputs, strict=True)]
        if len(steps) == 1:
            run(steps[0])
        else:
            # The backward first: its rows travel while the forward attends, and at the end, when the
            # forward waits for its last rows, it still has work.
            run_pair(*(step for _, step in sorted(zip(slot, steps, strict=True), key=_backward_first)))
        clock.end(slot, begin)

    def _steps(self, action: Action, value: Tensor | None) -> Steps:
        by_kind = {"F": self._forward, "B": self._backward, "W": self._weights}
        return by_kind[action.kind](action, value)

    def _forward(self, action: Action, taken: Tensor | None) -> Steps:
        key = action.microbatch, action.stage
        tape = self._recorder(*key)
        if taken is not None and isinstance(tape, Tape):
            taken.requires_grad_()
        phases = self._stages[action.stage].phases(tape, self._microbatches[action.microbatch], taken)
        made, self.returned[key] = yield from phases
        if isinstance(tape, Tape):
            self._flights[key] = _Flight(tape, taken, made)
        if action.stage + 1 < self._schedule.num_stages:
            self.mail.send(action, made.detach())

    def _backward(self, action: Action, gradient: Tensor | None) -> Steps:
        key = action.microbatch, action.stage
        flight, apart = self._flights.pop(key), key in self._schedule.apart
        if gradient is not None:
            assert flight.made is not None
            flight.tape.root(flight.made, gradient)
        yield from flight.tape.backward(weights_apart=apart)
        taken = flight.taken
        if taken is not None:
            self.mail.send(action, torch.zeros_like(taken) if taken.grad is None else taken.grad)
        if apart:
            self._apart[key] = flight.tape
        else:
            flight.tape.weights()

    def _weights(self, action: Action, _: Tensor | None) -> Steps:
        self._apart.pop((action.microbatch, action.stage)).weights()
        yield from ()
