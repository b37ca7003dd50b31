"""Stepping two generators in turn, so that one computes while the other's rows travel."""

from typing import Any

from parallel.pipeline.tape import Steps


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
