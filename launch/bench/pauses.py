"""A model's own steps, with sleeping for computing, or without the wire.

Sleeping is for where ranks are more than cores: what is measured then is the order of the work.

A phase that a microbatch would compute in takes a stated time in its forward, as long in its backward,
and as long again for its weights' gradients, which wait in the queue as real ones do.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Splits
from parallel.linear import now_or_later, queue_here
from parallel.pipeline.tape import Arrival, Recorder

HEAVY = ("_attend", "_dense", "_run_here", "_run_arrived")  # phases of a layer with nearly all its products


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, seconds: float) -> Tensor:
        ctx.seconds, ctx.queue = seconds, queue_here()
        time.sleep(seconds)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        now_or_later(ctx.queue, partial(time.sleep, ctx.seconds))
        return grads[0], None


def pause(value: Tensor, seconds: float) -> Tensor:
    """The value after so many seconds; its gradient takes as long, and once more for the weights'."""
    return _Pause.apply(value, seconds)


@dataclass
class Exercise:
    """How a step is exercised: longer phases, no wire; and what would pass it, width and splits."""

    pause_seconds: float = 0.0
    wireless: bool = False
    exchanges: list[tuple[torch.Size, Splits]] = field(default_factory=list)


class Paused:
    """A tape on which a layer's heavy phases take so much longer, and rows may stay where they are."""

    def __init__(self, tape: Recorder, exercise: Exercise) -> None:
        self._tape, self._exercise = tape, exercise

    def unit(self, name: str) -> None:
        """As on the tape."""
        self._tape.unit(name)

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """As on the tape, a heavy phase later."""
        seconds = self._exercise.pause_seconds
        if seconds and getattr(function, "__name__", "") in HEAVY:
            function = partial(_later, function, seconds)
        return self._tape.compute(function, *inputs)

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        """As on the tape, and listed; without a wire, as many other rows come at once."""
        self._exercise.exchanges.append((rows.shape[1:], splits))
        if not self._exercise.wireless:
            return self._tape.exchange(rows, splits)
        count = sum(splits.receive)
        return self._tape.exchange(
            self._tape.compute(_resized, rows, count), Splits((count,), (count,), None)
        )

    def root(self, value: Tensor, gradient: float) -> None:
        """As on the tape."""
        self._tape.root(value, gradient)


def _resized(rows: Tensor, count: int) -> Tensor:
    missing = max(0, count - rows.shape[0])
    return torch.cat([rows[:count], rows.new_zeros(missing, *rows.shape[1:])])


def _later(function: Callable[..., Any], seconds: float, *inputs: Any) -> Any:
    returned = function(*inputs)
    if isinstance(returned, tuple):
        return pause(returned[0], seconds), *returned[1:]
    return pause(returned, seconds)
