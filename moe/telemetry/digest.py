"""What a finished or running run amounts to, read from its folder in one pass over each file. No torch.

Expert load is long (steps x layers x experts), so it is held as frames of several steps, and step by step
only for the last window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moe.telemetry.frames import Growing, History, empty, join
from moe.telemetry.history import read_parts
from moe.telemetry.load import Layer, dead, entropy, max_vio
from moe.telemetry.rows import read_rows

ALL = "all"  # the evaluation domain that stands for the total
MAX_FRAMES = 400  # of the whole run: the points of a curve


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Expert load of one layer: at the last step, over the last window of steps, over the run."""

    layer: Layer
    num_experts: int
    max_vio: float
    max_vio_window: float
    entropy: float
    dead: int
    dead_window: int
    dropped: int  # over the run


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in numbers. Losses are nats per token; None stands for a loss that was not finite."""

    train: list[dict[str, Any]]  # the rows of training steps
    evaluated: dict[str, float | None]  # last validation loss by domain, the total under ALL
    layers: list[LayerLoad]
    window: int | None  # steps of the load window; None: not recorded, so the whole run
    load: History  # of the whole run
    recent: History  # of the load window
    sent_bytes: NDArray[np.int64]  # [ep, ep] by dispatch from row-rank to column-rank, forward
    domain_max_vio: dict[str, float]  # over each domain's sampled steps, mean over layers

    @property
    def window_steps(self) -> int:
        """Training steps that the load window holds by now."""
        return min(self.window or len(self.train), len(self.train))


def read_run(run_dir: str | Path) -> Run:
    """Read config.yaml, metrics.jsonl and expert_load.jsonl of a run's folder; a missing file is empty."""
    folder = Path(run_dir)
    train, evaluated = [], {}
    for row in read_rows(folder / "metrics.jsonl"):
        if "eval_loss" in row:
            evaluated[row["domain"]] = row["eval_loss"]
        else:
            train.append(row)
    window = read_window(folder)
    load, recent, last = _read_load(folder, window)
    return Run(
        train=train,
        evaluated=evaluated,
        layers=list(_layers(load, recent, last)),
        window=window,
        load=load,
        recent=recent,
        sent_bytes=load.sent_bytes.sum(0),
        domain_max_vio={
            name: float(np.mean([max_vio(counts) for counts in counts_LE if counts.any()]))
            for name, counts_LE in load.domains.items()
            if counts_LE.any()
        },
    )


def read_window(folder: Path) -> int | None:
    """`telemetry.window` of a run's config.yaml; None without one."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    window: int | None = config.get("telemetry", {}).get("window")
    return window


def _read_load(folder: Path, window: int | None) -> tuple[History, History, History]:
    """The whole run in few frames, its last `window` steps (None: the whole run), and its last step."""
    load, recent, last = Growing(MAX_FRAMES), empty(), empty()
    for part in read_parts(folder):
        load.add(part)
        last = part.after(part.last - 1)
        if window is not None:
            recent = join([recent, part]).after(last.last - window)
    run = load.history.coarsened(MAX_FRAMES)
    return run, run if window is None else recent, last


def _layers(load: History, recent: History, last: History) -> Iterator[LayerLoad]:
    dropped = np.nansum(load.scalars["dropped"], 0)
    for place, layer in enumerate(load.layers):
        now, window = last.counts[-1, place], recent.counts[:, place].sum(0)
        yield LayerLoad(
            layer=layer,
            num_experts=window.size,
            max_vio=max_vio(now),
            max_vio_window=max_vio(window),
            entropy=entropy(now),
            dead=dead(now),
            dead_window=dead(window),
            dropped=int(dropped[place]),
        )
