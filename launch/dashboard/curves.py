"""Numbers of each step as curves that a page can hold: means over spans of steps. No torch."""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = (
    *(
        "loss",
        "mtp_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "max_vio",
        "aux_loss",
    ),
    "memory_peak_bytes",
)


class Curves:
    """Columns of training rows in the order in which steps were made."""

    def __init__(self, most: int) -> None:
        """`most`: points of a curve at most."""
        self._most = most
        self._steps = array("q")
        self._columns = {name: array("d") for name in NUMBERS}

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics.jsonl; what it lacks, or holds as null, is not known."""
        self._steps.append(row["step"])
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(float("nan") if value is None else value)

    @property
    def doublings(self) -> int:
        """How often the steps of a point were doubled: earlier points are void where this has grown."""
        return max(0, -(-len(self._steps) // self._most) - 1).bit_length()

    @property
    def last_step(self) -> int:
        """0 before the first row."""
        return self._steps[-1] if self._steps else 0

    @property
    def step_seconds(self) -> float:
        """Mean of the last hundred steps, 0 where not known."""
        return _mean(np.frombuffer(self._columns["step_seconds"][-100:]), np.array([0]))[0] or 0.0

    def points(self, after: int, until: int) -> dict[str, list[Any]]:
        """Of steps later than `after`, up to `until`: the last step of each span, and means over it.

        None stands for a mean of nothing. A span that `after` cuts gives the mean of its rest, so that
        points never overlap.
        """
        steps = np.array(self._steps, dtype=np.int64)
        shown = slice(np.searchsorted(steps, after, "right"), np.searchsorted(steps, until, "right"))
        steps = steps[shown]
        if not steps.size:
            return {"step": [], **{name: [] for name in self._columns}}
        span = (np.arange(steps.size) + shown.start) >> self.doublings
        begins = np.flatnonzero(np.diff(span, prepend=-1))
        ends = np.append(begins[1:], steps.size) - 1
        means = {name: _mean(np.array(column)[shown], begins) for name, column in self._columns.items()}
        return {"step": steps[ends].tolist(), **means}


def _mean(values: NDArray[np.float64], begins: NDArray[np.int64]) -> list[float | None]:
    """Of each run of values that begins at one of `begins`, without NaN; None where all are."""
    if not values.size:
        return [None]
    known = np.isfinite(values)
    numbers = np.add.reduceat(known.astype(np.int64), begins)
    sums = np.add.reduceat(np.where(known, values, 0.0), begins)
    return [
        total / number if number else None
        for total, number in zip(sums.tolist(), numbers.tolist(), strict=True)
    ]
