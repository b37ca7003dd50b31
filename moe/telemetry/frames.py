"""A run's expert load as arrays over time, and how neighbouring stretches of it are summed. No torch.

A *frame* is one step, or several consecutive ones as one. Counts add up as integers, so that any
coarsening keeps the totals of a run exactly; what cannot be added is averaged or the last value is kept.

Legend: F frames, L layers, E experts, R expert-parallel ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.telemetry.load import Layer

Whole = NDArray[np.int64]
Real = NDArray[Any]  # float32; float64 where said

# What becomes of a layer's number when steps are summed.
SCALARS: Mapping[str, str] = {
    "max_vio": "mean",
    "max_vio_window": "last",
    "max_vio_microbatch": "mean",
    "max_vio_microbatch_max": "greatest",
    "entropy": "mean",
    "dead": "last",
    "collapsing": "last",
    "dropped": "sum",
    "logit_rms": "mean",
    "logit_max": "greatest",
    "margin": "mean",
    "group_limited": "mean",
}


@dataclass(frozen=True, kw_only=True)
class History:
    """A run's expert load, oldest frame first; floats are NaN where nothing was recorded.

    A run that went on with another layout has the most ranks it ever had: those away hold nothing.
    Domains and pairs are sums over the run's sampled steps, whichever frames are held.
    """

    layers: tuple[Layer, ...]
    steps: Whole  # [F] last step of each frame
    spans: Whole  # [F] how many steps it sums
    counts: Whole  # [F, L, E] summed
    gate: Real  # [F, L, E] mean weight over the tokens of the frame, 0 where one did not choose it
    bias: Real  # [F, L, E] after the frame's last step
    scalars: Mapping[str, Real]  # [F, L] for each of SCALARS; "dropped" as float64, which is exact
    received: Whole  # [F, L, R] rows received by each rank, summed
    rank_rows: Whole  # [F, R, R] rows from row-rank to column-rank, summed over layers and steps
    sent_bytes: Whole  # [F, R, R] the same in bytes
    links: Whole  # [F, 3] bytes kept on the rank, sent over NVLink, sent over the network
    expert_seconds: Real  # [F, L, R] mean of the frame's timed steps
    domains: Mapping[str, Whole] = field(default_factory=dict)  # [L, E] each
    pairs: Whole | None = None  # [L, E * (E - 1) / 2]: upper triangle in row-major order

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> int:
        """Last step held; 0 before the first."""
        return int(self.steps[-1]) if len(self) else 0

    def after(self, step: int) -> "History":
        """The frames whose last step is later than `step`."""
        return self._frames(int(np.searchsorted(self.steps, step, side="right")), len(self))

    def until(self, step: int) -> "History":
        """The frames whose last step is `step` at the latest."""
        return self._frames(0, int(np.searchsorted(self.steps, step, side="right")))

    def _frames(self, begin: int, end: int) -> "History":
        if (begin, end) == (0, len(self)):
            return self
        chosen = {name: getattr(self, name)[begin:end] for name in _ARRAYS}
        return replace(self, **chosen, scalars={name: v[begin:end] for name, v in self.scalars.items()})

    def coarsened(self, most: int) -> "History":
        """At most so many frames: neighbouring ones are summed, over spans of steps as equal as can be."""
        if len(self) <= most:
            return self

        def frames(width: int) -> int:
            return len(np.unique(_bins(self.steps, width)))

        # Widths are nested, so that frames which were merged before merge again as a whole.
        width, widest = 1, int(self.spans.max())
        while frames(width) > most:
            width = widest if width < widest < 2 * width else 2 * width
        return self.binned(width)

    def binned(self, width: int) -> "History":
        """Frames whose last steps fall into the same `width` steps (1 to width, ...) summed into one."""
        starts = np.flatnonzero(np.diff(_bins(self.steps, width), prepend=-1))
        if len(starts) == len(self):
            return self
        ends = np.append(starts[1:], len(self)) - 1
        every = np.ones(len(self))

        def total(values: NDArray[Any]) -> NDArray[Any]:
            return np.add.reduceat(values, starts)

        return replace(
            self,
            steps=self.steps[ends],
            spans=total(self.spans),
            counts=total(self.counts),
            gate=_mean(self.gate, self.counts.sum(2, keepdims=True), starts),
            bias=self.bias[ends],
            scalars={
                name: _scalar(SCALARS[name], values, self.spans, starts, ends)
                for name, values in self.scalars.items()
            },
            received=total(self.received),
            rank_rows=total(self.rank_rows),
            sent_bytes=total(self.sent_bytes),
            links=total(self.links),
            expert_seconds=_mean(self.expert_seconds, every[:, None, None], starts),
        )


_ARRAYS = (
    *("steps", "spans", "counts", "gate", "bias"),
    *("received", "rank_rows", "sent_bytes", "links", "expert_seconds"),
)


def empty() -> History:
    """No layers and no frames."""
    whole, real = np.zeros((0, 0, 0), np.int64), np.zeros((0, 0, 0), np.float32)
    return History(
        layers=(),
        steps=np.zeros(0, np.int64),
        spans=np.zeros(0, np.int64),
        counts=whole,
        gate=real,
        bias=real,
        scalars={name: np.zeros((0, 0), np.float32) for name in SCALARS},
        received=whole,
        rank_rows=whole,
        sent_bytes=whole,
        links=np.zeros((0, 3), np.int64),
        expert_seconds=real,
    )


def join(parts: Sequence[History]) -> History:
    """Stretches of one run, each later than the one before it, as one; their sampled sums are added."""
    held = [part for part in parts if part.layers]
    if len(held) <= 1:
        return held[0] if held else empty()
    assert len({part.layers for part in held}) == 1, "stretches of different runs"
    num_ranks = max(part.received.shape[2] for part in held)

    def stacked(name: str) -> NDArray[Any]:
        arrays = [getattr(part, name) for part in held]
        axes = {"received": (2,), "expert_seconds": (2,), "rank_rows": (1, 2), "sent_bytes": (1, 2)}
        return np.concatenate([_padded(array, num_ranks, axes.get(name, ())) for array in arrays])

    domains: dict[str, Whole] = {}
    for part in held:
        for name, counts in part.domains.items():
            domains[name] = domains[name] + counts if name in domains else counts
    pairs = [part.pairs for part in held if part.pairs is not None]
    return History(
        layers=held[0].layers,
        **{name: stacked(name) for name in _ARRAYS},
        scalars={name: np.concatenate([part.scalars[name] for part in held]) for name in SCALARS},
        domains=domains,
        pairs=np.sum(pairs, axis=0) if pairs else None,
    )


def _padded(array: NDArray[Any], size: int, axes: Sequence[int]) -> NDArray[Any]:
    """`array` widened to `size` ranks along `axes`: with zeros, or with NaN where it holds floats."""
    if all(array.shape[axis] == size for axis in axes):
        return array
    shape = [size if axis in axes else length for axis, length in enumerate(array.shape)]
    wide = np.full(shape, np.nan if np.issubdtype(array.dtype, np.floating) else 0, array.dtype)
    wide[tuple(slice(length) for length in array.shape)] = array
    return wide


def _bins(steps: Whole, width: int) -> Whole:
    return (steps - 1) // width


def _scalar(rule: str, values: Real, spans: Whole, starts: Whole, ends: Whole) -> Real:
    if rule == "last":
        return values[ends]
    if rule == "greatest":
        return np.fmax.reduceat(values, starts)
    if rule == "mean":
        return _mean(values, spans[:, None], starts)
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0), starts)
    return np.where(np.logical_or.reduceat(known, starts), total, np.nan)


def _mean(values: Real, weights: NDArray[Any], starts: Whole) -> Real:
    """Weighted mean over stretches of axis 0, of what is known; 0 where all weights are zero."""
    known = np.isfinite(values)
    whole = known.all()  # nearly always, and then a good deal faster
    weighed = np.broadcast_to(weights, values.shape) if whole else np.where(known, weights, 0)
    total = np.add.reduceat((values if whole else np.where(known, values, 0)) * weighed, starts)
    mean = total / np.maximum(np.add.reduceat(weighed, starts), 1)
    if whole:
        return mean.astype(values.dtype)
    return np.where(np.logical_or.reduceat(known, starts), mean, np.nan).astype(values.dtype)


class Growing:
    """Stretches of a run taken in one after another, held in at most 2 x `most` frames (None: any number).

    When there would be more, neighbouring frames are summed until `most` are left.
    """

    def __init__(self, most: int | None) -> None:
        self._most, self._parts, self._width = most, list[History](), 1

    @property
    def history(self) -> History:
        """All that was taken in, oldest first."""
        if len(self._parts) != 1:
            self._parts = [join(self._parts)]
        return self._parts[0]

    def add(self, part: History, coarse: bool = True) -> bool:
        """Take in a later stretch, no finer than what is held if `coarse`; whether earlier frames changed."""
        self._parts.append(part.binned(self._width) if coarse else part)
        if self._most is None or sum(map(len, self._parts)) <= 2 * self._most:
            return False
        self._parts = [self.history.coarsened(self._most)]
        self._width = int(self.history.spans.max())
        return True
