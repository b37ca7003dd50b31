"""What a sink is told: a step, an evaluation or an alarm, as named numbers. No torch.

Rows of the run's files become flat names such as `train/loss`, `experts/max_vio/layer-3` and
`eval/loss/DOMAIN`; a number that a row leaves out, or holds as null, has no name. A message keeps no
list of a row, so that a queue of them stays small. Services that keep every number get those of single
layers at every tenth step only: 61 layers have about 900.

Legend: L layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.telemetry.load import Layer

LAYERS_EVERY = 10  # steps between numbers of single layers, where they are kept for good
LOADS_EVERY = 100  # steps between loads of single experts
LINKS = ("kept", "nvlink", "network")  # as the rows' `links`
_NOT_MEASURED = ("step", "layer", "row_bytes")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Whose messages a sink carries, and where it may go with them."""

    run: Path
    project: str
    host: str
    port: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One training step."""

    number: int  # from 1
    train: dict[str, float]
    layers: dict[Layer, dict[str, float]]
    link_bytes: dict[str, int]  # moved by this step's dispatches, by LINKS; empty where not recorded
    loads: NDArray[np.float32] | None  # [L, E] tokens over the layer's mean; only every LOADS_EVERY steps

    @staticmethod
    def of(metrics_row: Row, load_rows: Sequence[Row]) -> "Step":
        """From the row of metrics.jsonl and those of expert_load.jsonl."""
        number = metrics_row["step"]
        return Step(
            number=number,
            train=_numbers(metrics_row),
            layers={row["layer"]: _layer(row) for row in load_rows},
            link_bytes=_link_bytes(load_rows),
            loads=_loads(load_rows) if (number - 1) % LOADS_EVERY == 0 else None,
        )

    def scalars(self) -> dict[str, float]:
        """By tidy name: the step's own, means over layers and, every LAYERS_EVERY steps, single layers."""
        named = {f"train/{key}": value for key, value in self.train.items()}
        named |= {f"traffic/{link}_bytes": float(moved) for link, moved in self.link_bytes.items()}
        gathered: dict[str, list[float]] = {}
        for layer, values in self.layers.items():
            for key, value in values.items():
                gathered.setdefault(key, []).append(value)
                if (self.number - 1) % LAYERS_EVERY == 0:
                    named[f"experts/{key}/layer-{layer}"] = value
        return named | {f"experts/{key}/mean": sum(v) / len(v) for key, v in gathered.items()}


@dataclass(frozen=True)
class Evaluation:
    """Validation after a step: `loss` and `perplexity` of a domain, "all" being the total."""

    step: int
    domain: str
    values: dict[str, float]

    @staticmethod
    def of(row: Row) -> "Evaluation":
        """From an evaluation's row of metrics.jsonl."""
        values = {key.removeprefix("eval_"): value for key, value in _numbers(row).items()}
        return Evaluation(row["step"], row["domain"], values)

    def scalars(self) -> dict[str, float]:
        """By tidy name: `eval/loss/DOMAIN`, `eval/perplexity/DOMAIN`."""
        return {f"eval/{key}/{self.domain}": value for key, value in self.values.items()}


@dataclass(frozen=True)
class Alarm:
    """Something that began to go wrong, in a sentence."""

    step: int
    kind: str
    text: str

    @staticmethod
    def of(row: Row) -> "Alarm":
        """From a row of alarms.jsonl."""
        return Alarm(row["step"], row["kind"], row["message"])


def picture(loads: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An RGB image [height, width, 3] of loads [L, E]: white even, orange twice the mean, blue little.

    An expert without any token is black. The colours are told apart under every colour blindness.
    """
    few, even, many = np.array([[0, 114, 178], [255, 255, 255], [213, 94, 0]], dtype=np.float32)
    distance = np.clip(loads - 1, -1, 1)[:, :, None]
    colours = even + np.where(distance < 0, -distance * (few - even), distance * (many - even))
    colours[loads == 0] = 0
    width = max(1, 768 // loads.shape[1])
    return colours.astype(np.uint8).repeat(12, axis=0).repeat(width, axis=1)


def _numbers(row: Row) -> dict[str, float]:
    """The single numbers that were measured."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and key not in _NOT_MEASURED
    }


def _layer(row: Row) -> dict[str, float]:
    """The numbers of a layer, with its worst rank and its widest bias."""
    numbers = _numbers(row)
    if row.get("rank_rows"):
        received = [sum(rows) for rows in zip(*row["rank_rows"], strict=True)]
        numbers["rank_share"] = max(received) * len(received) / max(1, sum(received))
    if bias := row.get("bias"):
        mean = sum(bias) / len(bias)
        numbers["bias_spread"] = max(max(bias) - mean, mean - min(bias))
    return numbers


def _link_bytes(rows: Iterable[Row]) -> dict[str, int]:
    moved = [[rows * row["row_bytes"] for rows in row["links"]] for row in rows if row.get("links")]
    return dict(zip(LINKS, map(sum, zip(*moved, strict=True)), strict=True)) if moved else {}


def _loads(rows: Sequence[Row]) -> NDArray[np.float32] | None:
    if not rows or not all(row.get("counts") for row in rows):
        return None
    counts = np.array([row["counts"] for row in rows], dtype=np.float32)
    return counts / np.maximum(counts.mean(axis=1, keepdims=True), 1)
