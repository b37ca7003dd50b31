"""What a finished or running run amounts to, read from its folder in one pass over each file. No torch.

Expert-load files are long (steps x layers rows), so only sums and the last window of counts are held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moe.telemetry.load import Layer, LoadWindow, dead, max_vio
from moe.telemetry.rows import read_rows

ALL = "all"  # the evaluation domain that stands for the total


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
    sent_bytes: NDArray[np.int64]  # [ep, ep] by dispatch from row-rank to column-rank, forward
    domain_max_vio: dict[str, float]  # of each domain's last recorded slice, mean over layers

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
    load = _ExpertLoad(window)
    for row in read_rows(folder / "expert_load.jsonl"):
        load.add(row)
    return Run(
        train=train,
        evaluated=evaluated,
        layers=list(load.layers()),
        window=window,
        sent_bytes=load.sent_bytes,
        domain_max_vio=load.domain_max_vio(),
    )


def read_window(folder: Path) -> int | None:
    """`telemetry.window` of a run's config.yaml; None without one."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    window: int | None = config.get("telemetry", {}).get("window")
    return window


class _ExpertLoad:
    """Sums over the rows of expert_load.jsonl."""

    def __init__(self, window: int | None) -> None:
        self._window = LoadWindow(window)
        self._last: dict[Layer, dict[str, Any]] = {}
        self._dropped: dict[Layer, int] = {}
        self._domains: dict[tuple[str, Layer], list[int]] = {}
        self.sent_bytes = np.zeros((0, 0), dtype=np.int64)

    def add(self, row: dict[str, Any]) -> None:
        layer = row["layer"]
        self._window.add(layer, row["counts"])
        self._last[layer] = row
        self._dropped[layer] = self._dropped.get(layer, 0) + row["dropped"]
        sent = np.asarray(row["rank_rows"], dtype=np.int64) * row["row_bytes"]
        self.sent_bytes = self.sent_bytes + sent if self.sent_bytes.size else sent
        for domain, counts in row.get("domains", {}).items():
            self._domains[domain, layer] = counts

    def layers(self) -> Iterator[LayerLoad]:
        for layer, row in self._last.items():
            yield LayerLoad(
                layer=layer,
                num_experts=len(row["counts"]),
                max_vio=row["max_vio"],
                max_vio_window=self._window.max_vio(layer),
                entropy=row["entropy"],
                dead=row["dead"],
                dead_window=dead(self._window.counts(layer)),
                dropped=self._dropped[layer],
            )

    def domain_max_vio(self) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for (domain, _), counts in self._domains.items():
            values.setdefault(domain, []).append(max_vio(counts))
        return {domain: sum(found) / len(found) for domain, found in values.items()}
