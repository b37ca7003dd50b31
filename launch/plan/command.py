"""`switchyard plan`: does a run fit into the memory of its machines? Asked before any are rented."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import compose
from launch.inherit import begin_from
from launch.options import Parser
from launch.output import check_json, write_json
from moe.config import RunConfig

if TYPE_CHECKING:
    from launch.plan.estimate import Estimate, Imbalance
    from launch.plan.imbalance import Found

STDOUT = Path("-")
IMBALANCE = 1.5  # assumed
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
_BAR = 32  # characters of a whole memory


def main(arguments: Sequence[str]) -> int:
    """Print the table and the verdict; the exit code is 0 where the run fits and 1 where it does not."""
    options = _parse(arguments)
    named, overrides = compose.take(options.settings, ("recipe",))
    config, notes = _begun(compose.from_recipe(named.get("recipe", "tiny"), overrides), overrides)
    from launch.plan.estimate import estimate  # imports torch
    from launch.plan.imbalance import imbalance_of

    find = imbalance_of(options.imbalance)

    def imbalance(changed: RunConfig) -> float:
        return find(changed).reckoned

    found = find(config)
    asked = estimate(config, found.reckoned)
    result, lines = asked.json() | found.json(), [*_table(asked), "", *notes, *_notes(found)]
    if options.compare:
        result["compare"], rows = _compare(config, imbalance)
        lines += ["", *rows]
    lines += ["", verdict(asked, imbalance)]
    print(json.dumps(result, indent=2) if options.json == STDOUT else "\n".join(lines), flush=True)
    if options.json != STDOUT:
        write_json(options.json, result)
    return 0 if asked.fits else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("plan")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--imbalance", default=str(IMBALANCE))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--json", type=Path, nargs="?", const=STDOUT)
    options = parser.parse_intermixed_args(arguments)
    if options.json is not None and "=" in str(options.json):  # a setting after a bare `--json`
        options.settings, options.json = [*options.settings, str(options.json)], STDOUT
    if options.json != STDOUT:
        check_json(options.json)
    return options


def _begun(config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings with the model of `train.init`, or with the recipe's where that is not at hand."""
    init = config.train.init
    if init is None:
        return config, ()
    if not Path(init).expanduser().exists():
        return config, (f"the model is the recipe's: `train.init={init}` is not here",)
    config, notes = begin_from(config, overrides)
    return config, (f"the model is that of `train.init={init}`", *notes)


def verdict(asked: "Estimate", imbalance: "Imbalance") -> str:
    """One sentence: whether the run fits, how full the fullest rank is, and what would make it fit."""
    from launch.plan.estimate import remedies

    fullest, room = asked.fullest, f"{asked.memory / 1e9:g} GB"
    full = f"{fullest.total_bytes / 1e9:.1f} of {room} on the fullest rank (rank {fullest.rank})"
    if asked.fits:
        return f"fits: {full}"
    found = remedies(asked.config, imbalance)
    if not found:
        return (
            f"does not fit: {full}; neither another `layout.ep` nor recomputation nor smaller microbatches "
            "are enough: use more ranks"
        )
    said = [f"{words} ({tried.fullest.total_bytes / 1e9:.1f} GB)" for words, tried in found]
    return f"does not fit: {full}; try {', or '.join(said)}"


def _table(asked: "Estimate") -> list[str]:
    """A line for each pipeline stage, in GB."""
    lines = ["  rank" + "".join(f"{name:>13}" for name in _COLUMNS) + "   GB (10^9 bytes)"]
    for rank in asked.ranks:
        cells = [getattr(rank, f"{name}_bytes") / 1e9 for name in _COLUMNS]
        full = min(1.0, rank.total_bytes / asked.memory)
        bar = "#" * round(full * _BAR)
        over = " too much" if rank.total_bytes > asked.memory else ""
        lines.append(
            f"{rank.rank:6}" + "".join(f"{cell:13.2f}" for cell in cells) + f"   [{bar:<{_BAR}}]{over}"
        )
    fullest = asked.fullest
    kept = ", ".join(f"{name} {held / 1e9:.2f}" for name, held in fullest.kept.items() if held > 5e6)
    lines.append(
        f"\na microbatch keeps on rank {fullest.rank}, {fullest.in_flight} of them at the peak: {kept} GB"
    )
    return lines


def _notes(found: "Found") -> list[str]:
    from launch.plan.estimate import ALLOWANCE

    return [
        *found.lines(),
        f"buffers hold exchanged rows and {ALLOWANCE / 1e9:g} GB assumed for CUDA, NCCL and the allocator",
    ]


def _compare(config: RunConfig, imbalance: "Imbalance") -> tuple[list[dict[str, Any]], list[str]]:
    """The same ranks under every degree of expert parallelism, with and without recomputation."""
    from launch.plan.estimate import estimate, possible_ep, with_ep

    rows, lines = [], ["layout.ep  train.recompute   fullest rank"]
    for ep in possible_ep(config):
        for recompute in ("none", "full"):
            changed = with_ep(replace(config, train=replace(config.train, recompute=recompute)), ep)
            tried = estimate(changed, imbalance(changed))
            rows.append({"ep": ep, "recompute": recompute, **tried.json()})
            total, said = tried.fullest.total_bytes / 1e9, "fits" if tried.fits else "does not fit"
            lines.append(f"{ep:9}  {recompute:<15}  {total:8.1f} GB  {said}")
    return rows, lines
