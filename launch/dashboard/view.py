"""A run as the page draws it: one JSON object, whole or only what came after a step. No torch.

It is made from the files of the run's folder, which training may be writing: a view ends at the last step
of which both the metrics and the expert load are there. What was given out before stays true while `epoch`
is the same; where it is not (a resumed run, frames that were summed further), the view is whole again.

Legend: F frames, L layers, E experts, R expert-parallel ranks, D domains.
"""

import base64
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from launch.dashboard.chance import preferred, together
from launch.dashboard.curves import Curves
from launch.dashboard.facts import facts, group, placement, seats
from launch.dashboard.tail import Kept, Tail
from moe.telemetry.history import Follower, History
from moe.telemetry.rows import finite

State = Literal["running", "finished", "ended"]
METRICS, EXPERT_LOAD, ALARMS = "metrics.jsonl", "expert_load.jsonl", "alarms.jsonl"
SETTINGS = "config.yaml"
MOST_POINTS = 2000  # of a curve
MOST_FRAMES, MOST_CELLS = 500, 2_000_000  # of a heatmap over time: F, and F x L x E
MOST_FOUND = 200  # preferences of domains, and pairs of experts
EVEN = 256  # what `load` says of an expert that got its layer's mean
QUIET_S, QUIET_STEPS = (
    60.0,
    20.0,
)  # without a change for so long, and so many steps' time, a run is not running


class RunView:
    """One run, followed. All methods may be called from several threads."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._lock = threading.Lock()
        self._settings = Kept[dict[str, Any]](folder / SETTINGS, lambda text: yaml.safe_load(text) or {}, {})
        self._environment = Kept[dict[str, Any]](folder / "environment.json", json.loads, {})
        self._timeline = Kept[Any](folder / "timeline.json", json.loads, None)
        self._recipe = Kept[str](folder / "recipe.txt", str, "")
        self._placement = Kept[dict[str, Any]](folder / "placement.json", json.loads, {})
        self._selection = Kept[dict[str, Any]](folder / "selection.json", json.loads, {})
        self._metrics, self._alarm_rows = Tail(folder / METRICS), Tail(folder / ALARMS)
        self._load = Follower(folder, self._most_frames())
        self._voided = 0  # times that what was given out became void, beside those that the parts count
        self._given = 0  # the last step of the newest view
        self._begin_rows()
        self._alarms: list[dict[str, Any]] = []
        self._found: tuple[tuple[int, ...], dict[str, Any]] = ((), {})
        self.poll()

    def poll(self) -> None:
        """Take in what was written since the last call."""
        with self._lock:
            self._poll_load()
            self._poll_metrics()
            self._poll_alarms()

    def view(self, after: int | None = None, epoch: int | None = None) -> dict[str, Any]:
        """The whole view, or what came after a step, if `epoch` is still the one of the view that had it."""
        with self._lock:
            partial = after is not None and epoch == self._epoch
            begin = after if partial and after is not None else -1
            settings, last = self._settings.get(), self._last_step
            self._given = last
            history = self._load.history
            num_ranks = history.received.shape[-1]
            return {
                "name": self.name,
                "folder": str(self.folder),
                "state": self._state(),
                "epoch": self._epoch,
                "partial": partial,
                "facts": facts(settings, self._environment.get(), self._recipe.get(), self._last_row),
                "steps_total": group(settings, "train").get("steps") or last,
                "metrics": self._curves.points(begin, last),
                "evaluations": {domain: list(points) for domain, points in self._evaluations.items()},
                "alarms": [row for row in self._alarms if begin < row["step"] <= last],
                "layers": [str(layer) for layer in history.layers],
                "num_experts": history.counts.shape[-1],
                "num_ranks": num_ranks,
                "placement": self._placed(history),
                "frames": _frames(history, (history.steps > begin) & (history.steps <= last)),
                "traffic": _traffic(history),
                **self._specialisation(history, group(settings, "model").get("top_k", 1)),
                "timeline": self._timeline.get(),
            }

    def mark(self) -> dict[str, Any]:
        """What a listener is told when it differs from before; the last two are written after their step."""
        with self._lock:
            return {
                "epoch": self._epoch,
                "step": self._last_step,
                "state": self._state(),
                "evaluations": sum(map(len, self._evaluations.values())),
                "timed": (self._timeline.get() or {}).get("step"),
            }

    def newest(self) -> tuple[History, int]:
        """The run's frames, and which of them is the newest that a view shows; -1 where there is none."""
        with self._lock:
            history = self._load.history
            return history, int(np.searchsorted(history.steps, self._last_step, "right")) - 1

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's settings as they lie in config.yaml."""
        return self._settings.get()

    @property
    def last_row(self) -> Mapping[str, Any]:
        """The newest row of a training step; empty before the first."""
        return self._last_row

    def alarms(self) -> list[dict[str, Any]]:
        """Every alarm so far, oldest first."""
        with self._lock:
            return list(self._alarms)

    def _specialisation(self, history: History, top_k: int) -> dict[str, Any]:
        """Domains and pairs, found anew only when more steps were sampled."""
        sums = [int(counts.sum()) for counts in history.domains.values()]
        pairs = 0 if history.pairs is None else int(history.pairs.sum())
        stamp = (self._epoch, sum(sums), pairs)
        if self._found[0] != stamp:
            self._found = stamp, {"domains": _domains(history, top_k), "pairs": _pairs(history)}
        return self._found[1]

    def _placed(self, history: History) -> list[list[int]]:
        """By layer, the rank that holds each expert now."""
        num_ranks = int(_present_ranks(history)[-1:].sum()) or history.received.shape[-1]
        kept, selection = self._placement.get(), self._selection.get()
        found = seats(self._settings.get(), kept, selection, history.layers, num_ranks)
        return placement(history.layers, history.counts.shape[-1], num_ranks, found)

    def _most_frames(self) -> int:
        """Frames that a page can hold of a model this large; the follower holds up to twice as many."""
        model = group(self._settings.get(), "model")
        cells = max(1, model.get("num_layers", 1) * model.get("num_experts", 1))
        return max(32, min(MOST_FRAMES, MOST_CELLS // cells))

    def _begin_rows(self) -> None:
        self._curves = Curves(MOST_POINTS)
        self._evaluations: dict[str, list[list[float | None]]] = {}
        self._last_row: dict[str, Any] = {}

    def _poll_load(self) -> None:
        before = self._shape
        self._load.poll()
        self._voided += self._shape != before  # the first step, or more ranks: all rows have another width

    @property
    def _shape(self) -> tuple[int, ...]:
        history = self._load.history
        return (*history.counts.shape[1:], history.received.shape[-1])

    def _poll_metrics(self) -> None:
        before = self._metrics.epoch
        rows = self._metrics.poll()
        if self._metrics.epoch != before:
            self._voided += self._curves.doublings  # the new curves count theirs from 0
            self._begin_rows()
        for row in rows:
            if "eval_loss" in row:
                self._evaluations.setdefault(row["domain"], []).append([row["step"], row["eval_loss"]])
            else:
                self._curves.add(row)
                self._last_row = row

    def _poll_alarms(self) -> None:
        before = self._alarm_rows.epoch
        rows = list(self._alarm_rows.poll())
        if self._alarm_rows.epoch != before:
            self._alarms = []
        self._alarms += rows
        if any(row["step"] <= self._given for row in rows):
            self._voided += 1  # written after its step was given out: only a whole view would bring it

    @property
    def _epoch(self) -> int:
        parts = self._load.epoch + self._metrics.epoch + self._alarm_rows.epoch
        return parts + self._curves.doublings + self._voided

    @property
    def _last_step(self) -> int:
        """The last step of which everything is there; of a model without experts, that of the metrics."""
        steps = self._load.history.steps
        ends = [*steps[-1:].tolist(), *([self._curves.last_step] if self._curves.last_step else [])]
        return min(ends, default=0)

    def _state(self) -> State:
        if self._curves.last_step and self._curves.last_step == group(self._settings.get(), "train").get(
            "steps"
        ):
            return "finished"
        files = [self.folder / name for name in (METRICS, EXPERT_LOAD, SETTINGS)]
        changed = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
        quiet = max(QUIET_S, QUIET_STEPS * self._curves.step_seconds)
        return "running" if time.time() - changed <= quiet else "ended"


def _frames(history: History, shown: NDArray[np.bool_]) -> dict[str, Any]:
    counts = history.counts[shown]
    scalars = {name: values[shown] for name, values in history.scalars.items() if _any_known(values)}
    received, num_ranks = history.received[shown], _present_ranks(history)[shown].sum(1)
    return {
        "step": history.steps[shown].tolist(),
        "span": history.spans[shown].tolist(),
        "load": _packed(load(counts), "<u2"),
        "bias": _packed(history.bias[shown], "<f4") if _any_known(history.bias) else None,
        "scalars": {name: _packed(values, "<f4") for name, values in scalars.items()},
        "received": _packed(
            received * num_ranks[:, None, None] / np.maximum(1, received.sum(-1, keepdims=True)), "<f4"
        ),
        "expert_seconds": (
            _packed(history.expert_seconds[shown], "<f4") if _any_known(history.expert_seconds) else None
        ),
    }


def load(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Counts [..., E] over their mean in 1/256: 0 is exactly no token, 65535 that or more."""
    mean = counts.sum(-1, keepdims=True) / max(1, counts.shape[-1])
    scaled = np.rint(counts * (EVEN / np.maximum(1e-9, mean)))
    return np.where(counts > 0, np.clip(scaled, 1, 65535), 0).astype(np.uint16)


def _present_ranks(history: History) -> NDArray[np.bool_]:
    """The ranks that sent or received rows, [F, R]: a run that went on with fewer ranks leaves some out."""
    return np.asarray((history.rank_rows.sum(1) + history.rank_rows.sum(2)) > 0)


def _traffic(history: History) -> dict[str, Any]:
    kept, nvlink, network = history.links.sum(0).tolist() or [0, 0, 0]
    return {
        "bytes": history.sent_bytes.sum(0).tolist(),
        "kept": kept,
        "nvlink": nvlink,
        "network": network,
    }


def _domains(history: History, top_k: int) -> dict[str, Any] | None:
    if not history.domains:
        return None
    names = sorted(history.domains)
    counts = np.stack([history.domains[name] for name in names])  # [D, L, E]
    share = counts / np.maximum(1, counts.sum(-1, keepdims=True))
    found = preferred(counts, top_k, MOST_FOUND)
    return {
        "names": names,
        "share": _packed(share, "<f4"),
        "preferred": [
            [names[domain], str(history.layers[layer]), expert, ratio, z]
            for domain, layer, expert, ratio, z in found
        ],
    }


def _pairs(history: History) -> list[list[Any]] | None:
    if history.pairs is None:
        return None
    found = together(history.pairs, MOST_FOUND)
    return [[str(history.layers[layer]), i, j, ratio, count] for layer, i, j, ratio, count in found]


def _any_known(values: NDArray[np.float32]) -> bool:
    return bool(np.isfinite(values).any())


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def as_json(value: Any) -> bytes:
    """As a browser reads it, which knows no NaN."""
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":")).encode()
