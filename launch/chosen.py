"""From scores of experts to a selection, its files and the table of what was chosen. No torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launch.recorded import read_recorded
from moe.config import ModelConfig, RunConfig
from moe.selection import Scores, Selection, as_json, gate_scale, released_numbers, shortest_prefix
from moe.telemetry.rows import replace_file
from parallel.errors import UserError

_FRAMES = 1000  # of a long record at one time in memory


def recorded_scores(run: Path, domain: str | None) -> tuple[RunConfig, Scores]:
    """A run's settings, and the scores of all tokens that it trained on, or of one domain's counted ones."""
    config, history = read_recorded(run, _FRAMES)
    counts = history.counts.sum(0)
    gate: dict[str, list[float]] = {}
    if domain is not None:
        if domain not in history.domains:
            known = ", ".join(history.domains) or "none (`telemetry.domains_every`)"
            raise UserError(f"`--domain` must be one that {run} counted, but is {domain}: it has {known}")
        counts = history.domains[domain]
    every = counts.sum(1, keepdims=True).clip(1)
    names = [str(layer) for layer in history.layers]
    token = dict(zip(names, (counts / every).tolist(), strict=True))
    recorded = history.gate.astype(float)
    if domain is None and np.isfinite(recorded).all() and recorded.any():
        sums = (recorded * history.counts.sum(2, keepdims=True)).sum(0)
        gate = dict(zip(names, (sums / every / gate_scale(config.model)).tolist(), strict=True))
    return config, Scores(token=token, gate=gate, tokens=int(every.max()) // config.model.top_k)


def choose(scores: Scores, kind: Literal["token", "gate"], threshold: float) -> Selection:
    """In each layer the fewest experts whose scores reach the threshold."""
    layers = scores.token if kind == "token" else scores.gate
    return Selection(experts={layer: shortest_prefix(values, threshold) for layer, values in layers.items()})


def write_selection(out: Path, model: ModelConfig, selection: Selection, scores: Scores) -> None:
    """The selection, and beside it the scores as ESFT's own scripts lay them out."""
    numbers = released_numbers(model)
    content: dict[str, Any] = {"tokens": scores.tokens}
    for kind, layers in (("token_scores", scores.token), ("gate_scores", scores.gate)):
        if layers:
            content[kind] = {number: _numbered(layers[name]) for number, name in numbers.items()}
    replace_file(scores_file(out), json.dumps(content).encode())
    replace_file(out, json.dumps(as_json(selection, model)).encode())


def _numbered(values: Sequence[float]) -> dict[str, float]:
    return {str(expert): value for expert, value in enumerate(values)}


def scores_file(out: Path) -> Path:
    """Where the scores of a selection go: `law.scores.json` beside `law.json`."""
    return out.with_name(f"{out.stem}.scores{out.suffix}")


def describe(model: ModelConfig, selection: Selection, scores: Scores, kind: str, threshold: float) -> str:
    """A table of what was chosen."""
    rows = [
        f"  {layer:>5}  {len(selection.experts[layer]):>7}  {' '.join(map(str, selection.experts[layer]))}"
        for layer in released_numbers(model).values()
    ]
    said = f"{kind} scores of {scores.tokens:,} tokens, threshold {threshold:g}\n"
    return "\n".join((said, "  layer  experts  numbers, the greatest score first", *rows))


def count(model: ModelConfig, selection: Selection) -> str:
    """How many experts were chosen of how many."""
    chosen = sum(map(len, selection.experts.values()))
    return f"{chosen} of {model.num_experts * len(released_numbers(model))} experts"
