"""Rows of a small made-up run, and its sinks."""

from pathlib import Path
from typing import Any

from moe.telemetry.sinks.outlet import Outlets, open_outlets

COUNTS = {1: [4, 0, 8, 4], 2: [4, 4, 4, 4], "mtp0": [16, 0, 0, 0]}
CONFIG = {"model": {"num_experts": 4}, "data": {"paths": ["x" * 900]}, "train": {"steps": 3}}
ALARM = {"step": 2, "kind": "dead_expert", "layer": 1, "expert": 1, "rank": None, "message": "expert 1 died"}
EVALUATION = {"step": 2, "eval_loss": 1.5, "perplexity": 4.4817, "domain": "wiki?en"}


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    row = {"step": step, "tokens": 16 * step, "loss": 1 / step, "mtp_loss": None, "mfu": None}
    return row | {"tokens_per_second": 64.0, "step_seconds": 0.25, "max_vio": 0.5} | changes


def loads(step: int) -> list[dict[str, Any]]:
    """Two ranks of two experts; every layer sends 8 rows home, 6 in the node and 2 over the network."""
    shared = {"step": step, "rank_rows": [[6, 2], [6, 2]], "row_bytes": 10, "links": [8, 6, 2]}
    return [
        {"layer": layer, "counts": counts, "max_vio": place + 0.25, "dead": counts.count(0)}
        | {"entropy": 0.9, "dropped": 3, "bias": [-1.0, 0.0, 0.0, 1.0], "max_vio_window": 2 * place}
        | shared
        for place, (layer, counts) in enumerate(COUNTS.items())
    ]


def outlets(run: Path, *names: str, port: int = 0) -> Outlets:
    run.mkdir(exist_ok=True)
    return open_outlets(names, run, project="probe", host="127.0.0.1", port=port, config=CONFIG)
