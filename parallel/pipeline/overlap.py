"""Stepping the generators of two microbatches in turn, so that one computes while the other's rows travel."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from parallel.pipeline.tape import Steps, Tape, run

Value = TypeVar("Value")


def run_pair(first: Steps, second: Steps) -> tuple[Any, Any]:
    """Step two generators in turn to their ends; return what each returns.

    The order of the steps is fixed, so every rank makes its collectives in the same order.
    """
    live, returned = {0: first, 1: second}, {}
    while live:
        for which, steps in list(live.items()):
            try:
                next(steps)
            except StopIteration as stop:
                returned[which] = stop.value
                del live[which]
    return returned[0], returned[1]


def forward_backward(
    forward: Callable[[Tape, Value], Steps],
    microbatches: Sequence[Value],
    *,
    overlap: bool,
    recompute: bool = False,
) -> Iterator[Any]:
    """Run the forward and the backward of every microbatch; yield what each forward returned, in order.

    Overlapped, microbatch i + 1 goes forward while microbatch i goes backward: F0, F1 & B0, F2 & B1,
    ..., and two microbatches' activations are held. Gradients accumulate in the same order either
    way and are bit-equal.
    """
    before: Tape | None = None
    for microbatch in microbatches:
        tape = Tape(recompute=recompute)
        if before is not None and overlap:
            returned, _ = run_pair(forward(tape, microbatch), before.backward())
        else:
            returned = run(forward(tape, microbatch))
        before = tape
        if not overlap:
            run(tape.backward())
        yield returned
    if before is not None and overlap:
        run(before.backward())
