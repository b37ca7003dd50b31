"""Alarms with reasons: what has begun to go wrong in a run, where, and what to try. No torch.

`Watch` reads the rows a step has written (metrics.jsonl, expert_load.jsonl) and returns what begins now.
What is a value beyond its limit (`telemetry.alarms.*`; null switches an alarm off):

dead_expert  no token for `dead_steps` steps in a row.
max_vio      MaxVio of a layer's counts summed over the window, once that many steps have been trained: a
             fresh model is uneven. At most num_experts / top_k - 1, since a token chooses an expert once.
bias         an expert's selection bias lies further than the limit from its layer's mean, is further off
             than a window before, and yet its load over the window is off by more than a quarter, to the
             side the bias works against. A large bias that keeps an expert even does its work, and one
             that rests has not run away. A drift of all biases of a layer changes no choice, and is none.
rank_share   rows received over the window by an expert-parallel rank, over the mean of the ranks, in one
             layer: its all-to-all waits for the slowest rank, so another layer makes up for nothing.
domain       a domain's mean share of the assignments of the last 10 sampled steps has fallen below
             `domain` times what it was in the 20 to 40 samples before, as when its texts have run out.
             Documents come in clumps: the fall must also exceed 4 standard errors, by the samples' spread.
loss_spike   more than `loss_spike` deviations above the median of the last 100 finite losses (50 at
             least). A deviation is 1.4826 * the median absolute one, which earlier spikes do not widen,
             and 1% of the median at least. At the start the loss falls below its median: no alarm.
not_finite   loss or gradient norm is no number (null in a row).
fp8_error    a layer's greatest error of an FP8 product, relative to bf16's on the same inputs; null, which
             is no number, is beyond any limit.

An alarm is told when it begins. It has ended, and may be told again, when its value has kept to the limit
for twice the steps (samples, losses) it is measured over. So whether one is told depends on the last
`horizon` steps and nothing earlier: `replay` of those rows brings a resumed run to where it was. Domains
look back 70 samples. Where `telemetry.full_steps` keeps fewer rows than that, what is measured begins anew
at the oldest row: an alarm may then come later, or one that still lasts be told again, but none is made up.
So do the ranks' shares where a run goes on with another number of ranks.

What begins in several layers at one step is one alarm, about the worst of them.
Legend: L layers, E experts, R expert-parallel ranks.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.telemetry import reasons
from moe.telemetry.load import Layer
from moe.telemetry.reasons import Limits

OFF_BALANCE = 0.25  # distance of a load from the mean, over the mean, that a bias should have mended
SAMPLES, SAMPLES_BEFORE, LEAST_BEFORE = 10, 40, 20  # of domains
STANDARD_ERRORS = 4.0
LOSSES, LEAST_LOSSES = 100, 50
LEAST_DEVIATION = 0.01  # of the median loss

Array = NDArray[Any]


@dataclass(frozen=True)
class Alarm:
    """One alarm that began at a step; None where it concerns no one layer, expert or rank."""

    step: int
    kind: str
    layer: Layer | None
    expert: int | None
    rank: int | None
    message: str

    def row(self) -> dict[str, Any]:
        """As a row of alarms.jsonl."""
        return asdict(self)

    def line(self) -> str:
        """As a line among a run's progress."""
        return f"step {self.step}: alarm: {self.message}"


class Watch:
    """Watches a run. `limits` has the keys of `telemetry.alarms`, `window` is `telemetry.window` in steps.

    `placement` [E] by layer says which expert-parallel rank holds each expert; without it alarms about
    experts name no rank.
    """

    def __init__(
        self,
        limits: Limits,
        window: int,
        placement: Mapping[Layer, Sequence[int]] | None = None,
    ) -> None:
        self._loads = _Loads(limits, window, placement or {})
        self._domains = _Domains(limits)
        self._losses = _Losses(limits)
        self._fp8 = _Fp8(limits)
        self.horizon = 3 * max(window, int(limits["dead_steps"] or 0))  # steps; of expert load, not domains

    def step(
        self,
        metrics_row: Mapping[str, Any],
        load_rows: Sequence[Mapping[str, Any]],
        fp8_rows: Sequence[Mapping[str, Any]] = (),
    ) -> list[Alarm]:
        """The alarms that begin with a step's row of metrics and its rows of each layer: expert load, FP8."""
        return [*self._losses.step(metrics_row), *self._load(load_rows), *self._fp8.step(fp8_rows)]

    def replay(
        self,
        metrics_rows: Iterable[Mapping[str, Any]],
        load_rows: Iterable[Mapping[str, Any]],
        fp8_rows: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Take in the rows of the steps before, oldest first, without telling; evaluations are left out."""
        for _, compared in groupby(fp8_rows, key=lambda row: row["step"]):
            self._fp8.step(list(compared))
        trained = (row for row in metrics_rows if "eval_loss" not in row)
        for row in deque(trained, maxlen=3 * LOSSES):
            self._losses.step(row)
        for _, rows in groupby(load_rows, key=lambda row: row["step"]):
            self._load(list(rows))

    def _load(self, rows: Sequence[Mapping[str, Any]]) -> list[Alarm]:
        return [*self._loads.step(rows), *self._domains.step(rows[0])] if rows else []


class _Onset:
    """Which of many places go beyond their limit now and have not for `quiet` steps."""

    def __init__(self, quiet: int) -> None:
        self._quiet = quiet
        self._last: Array | None = None

    def __call__(self, step: int, beyond: Array) -> Array:
        """Of booleans of any shape, those that begin; another shape than before begins anew."""
        if self._last is None or self._last.shape != beyond.shape:
            self._last = np.full(beyond.shape, -(2**40))
        begin: Array = beyond & (step - self._last > self._quiet)
        self._last[beyond] = step
        return begin


class _Window:
    """The integer arrays of the last `size` steps, and their sum; another shape than before begins anew."""

    def __init__(self, size: int) -> None:
        self._arrays: deque[Array] = deque(maxlen=size)
        self.sum: Array = np.zeros((), dtype=np.int64)

    def add(self, array: Array) -> bool:
        """Append a step's array; whether the window is full."""
        if self._arrays and self._arrays[-1].shape != array.shape:
            self._arrays.clear()
            self.sum = np.zeros((), dtype=np.int64)
        oldest = self._arrays[0] if len(self._arrays) == self._arrays.maxlen else 0
        self.sum = self.sum + array - oldest
        self._arrays.append(array)
        return len(self._arrays) == self._arrays.maxlen


class _Loads:
    """Alarms about experts and ranks: arrays over all layers at once."""

    def __init__(self, limits: Limits, window: int, placement: Mapping[Layer, Sequence[int]]) -> None:
        self._limits, self._window, self._placement = limits, window, placement
        self._counts, self._received = _Window(window), _Window(window)
        self._distances: deque[Array] = deque(maxlen=window)  # [L, E] of each bias from its layer's mean
        self._idle: Array = np.zeros((), dtype=np.int64)  # [L, E] steps in a row without a token
        self._dead = _Onset(2 * int(limits["dead_steps"] or 0))
        self._uneven, self._runaway, self._loaded = (_Onset(2 * window) for _ in range(3))

    def step(self, rows: Sequence[Mapping[str, Any]]) -> list[Alarm]:
        """The alarms of a step's rows: those of every layer, in the same order at every step."""
        step, layers = rows[0]["step"], [row["layer"] for row in rows]
        counts = np.array([row["counts"] for row in rows], dtype=np.int64)
        self._idle = np.where(counts > 0, 0, self._idle + counts.any(1, keepdims=True))
        found = [self._dead_experts(step, layers)]
        full = self._counts.add(counts)
        load = _over_mean(self._counts.sum)
        if full:
            found.append(self._max_vio(step, layers, load))
        if "bias" in rows[0]:
            bias = np.array([row["bias"] for row in rows], dtype=np.float32)
            self._distances.append(bias - bias.mean(1, keepdims=True))
            if len(self._distances) == self._window:
                found.append(self._bias(step, layers, load))
        if "rank_rows" in rows[0]:
            received = np.array([row["rank_rows"] for row in rows], dtype=np.int64).sum(1)
            if self._received.add(received):
                found.append(self._rank_share(step, layers))
        return [alarm for alarm in found if alarm]

    def _dead_experts(self, step: int, layers: Sequence[Layer]) -> Alarm | None:
        limit = self._limits["dead_steps"]
        if limit is None or not (begin := self._dead(step, self._idle >= limit)).any():
            return None
        place, others = _worst(begin.sum(1), layers)
        layer, experts = layers[place], np.flatnonzero(begin[place]).tolist()
        ranks = sorted({rank for expert in experts if (rank := self._rank(layer, expert)) is not None})
        message = reasons.dead_expert(layer, experts, ranks, int(limit), others)
        return Alarm(step, "dead_expert", layer, _only(experts), _only(ranks), message)

    def _max_vio(self, step: int, layers: Sequence[Layer], load: Array) -> Alarm | None:
        limit, values = self._limits["max_vio"], load.max(1) - 1.0
        if limit is None or not (begin := self._uneven(step, values > limit)).any():
            return None
        place, others = _worst(values * begin, layers)
        layer, expert = layers[place], int(load[place].argmax())
        rank = self._rank(layer, expert)
        message = reasons.max_vio(layer, expert, rank, values[place], limit, self._window, others)
        return Alarm(step, "max_vio", layer, expert, rank, message)

    def _bias(self, step: int, layers: Sequence[Layer], load: Array) -> Alarm | None:
        limit, distance, before = self._limits["bias"], self._distances[-1], self._distances[0]
        if limit is None:
            return None
        size = abs(distance)
        ignored = np.sign(distance) * (load - 1.0) < -OFF_BALANCE  # a raised bias should raise the load
        begin = self._runaway(step, (size > limit) & (size > abs(before)) & ignored)
        if not begin.any():
            return None
        place, others = _worst((size * begin).max(1), layers)
        layer, expert = layers[place], int((size * begin)[place].argmax())
        rank, facts = self._rank(layer, expert), (distance[place, expert], load[place, expert])
        message = reasons.bias(layer, expert, rank, *facts, limit, self._window, others)
        return Alarm(step, "bias", layer, expert, rank, message)

    def _rank_share(self, step: int, layers: Sequence[Layer]) -> Alarm | None:
        limit, share = self._limits["rank_share"], _over_mean(self._received.sum)
        if limit is None or not (begin := self._loaded(step, share > limit)).any():
            return None
        place, others = _worst((share * begin).max(1), layers)
        layer, rank = layers[place], int((share * begin)[place].argmax())
        expert = None
        if layer in self._placement:
            here = np.asarray(self._placement[layer]) == rank
            expert = int(np.where(here, self._counts.sum[place], -1).argmax())
        message = reasons.rank_share(layer, rank, expert, share[place, rank], limit, self._window, others)
        return Alarm(step, "rank_share", layer, expert, rank, message)

    def _rank(self, layer: Layer, expert: int) -> int | None:
        return int(self._placement[layer][expert]) if layer in self._placement else None


class _Domains:
    """Alarms about domains, whose tokens every layer counts alike: the first one is read."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits["domain"]
        self._samples: deque[Mapping[str, float]] = deque(maxlen=SAMPLES + SAMPLES_BEFORE)
        self._seen = 0
        self._starved: dict[str, _Onset] = {}

    def step(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of a layer's row: none where no domains were counted."""
        counted = {name: sum(counts) for name, counts in row.get("domains", {}).items()}
        total = sum(counted.values())
        if self._limit is None or not total:
            return []
        self._seen += 1
        self._samples.append({name: count / total for name, count in counted.items()})
        if len(self._samples) < SAMPLES + LEAST_BEFORE:
            return []
        names = sorted({name for sample in self._samples for name in sample})
        shares = np.array([[sample.get(name, 0.0) for name in names] for sample in self._samples])
        earlier, recent = shares[:-SAMPLES], shares[-SAMPLES:].mean(0)
        before = earlier.mean(0)
        error = earlier.std(0, ddof=1) * math.sqrt(1 / SAMPLES + 1 / len(earlier))
        starved = (recent < self._limit * before) & (before - recent > STANDARD_ERRORS * error)
        return [
            Alarm(
                row["step"], "domain", None, None, None, reasons.domain(name, now, then, self._limit, SAMPLES)
            )
            for name, now, then, starves in zip(names, recent, before, starved, strict=True)
            if self._onset(name)(self._seen, np.array(starves))
        ]

    def _onset(self, name: str) -> _Onset:
        return self._starved.setdefault(name, _Onset(2 * SAMPLES))


class _Fp8:
    """Alarms about products in FP8, of the steps that compared them."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits["fp8_error"]
        self._seen = 0
        self._off = _Onset(2)

    def step(self, rows: Sequence[Mapping[str, Any]]) -> list[Alarm]:
        """The alarms of a step's rows of fp8.jsonl, one of each layer in the same order; none otherwise."""
        if self._limit is None or not rows:
            return []
        self._seen += 1
        errors = np.array([row["error"] for row in rows], dtype=np.float64)  # null becomes NaN
        errors = np.where(np.isfinite(errors), errors, np.inf)
        if not (begin := self._off(self._seen, errors > self._limit)).any():
            return []
        place, others = _worst(np.where(begin, errors, 0.0), [row["layer"] for row in rows])
        step, layer = rows[place]["step"], rows[place]["layer"]
        message = reasons.fp8_error(layer, float(errors[place]), self._limit, others)
        return [Alarm(step, "fp8_error", layer, None, None, message)]


class _Losses:
    """Alarms about the loss and the gradient."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits["loss_spike"]
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._norms: deque[float] = deque(maxlen=LOSSES)
        self._spike, self._broken = _Onset(2 * LOSSES), _Onset(2 * LOSSES)

    def step(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of a row of metrics.jsonl."""
        step, loss, norm = row["step"], _number(row["loss"]), _number(row.get("grad_norm", 0.0))
        usual_norm = median(self._norms) if self._norms else None
        found = []
        if self._broken(step, np.array(loss is None or norm is None)):
            message = reasons.not_finite(loss, norm, row.get("tokens"), usual_norm)
            found.append(Alarm(step, "not_finite", None, None, None, message))
        if loss is not None and self._limit is not None and len(self._losses) >= LEAST_LOSSES:
            usual = median(self._losses)
            spread = 1.4826 * median(abs(other - usual) for other in self._losses)
            deviations = (loss - usual) / max(spread, LEAST_DEVIATION * abs(usual), 1e-12)
            if self._spike(step, np.array(deviations > self._limit)):
                facts = (loss, usual, deviations, self._limit, row.get("tokens"), norm, usual_norm)
                found.append(Alarm(step, "loss_spike", None, None, None, reasons.loss_spike(*facts)))
        if loss is not None:
            self._losses.append(loss)
        if norm is not None:
            self._norms.append(norm)
        return found


def _over_mean(values: Array) -> Array:
    """Sums [L, N] over the mean of their layer; 1 where a layer has none."""
    mean = values.mean(1, keepdims=True)
    return np.where(mean > 0, values / np.where(mean > 0, mean, 1.0), 1.0)


def _worst(values: Array, layers: Sequence[Layer]) -> tuple[int, list[Layer]]:
    """The place of the greatest of values [L], and the other layers with a value above 0."""
    place = int(values.argmax())
    return place, [layer for other, layer in enumerate(layers) if values[other] > 0 and other != place]


def _only(places: Sequence[int]) -> int | None:
    return places[0] if len(places) == 1 else None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
