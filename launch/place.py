"""`switchyard place-experts`: which experts should live on which rank, by the load that a run recorded.

The first half of the chosen steps decides, and the second half, which it has not seen, says what that is
worth. `switchyard train run=RUN layout.placement=FILE` moves the experts there at the run's last checkpoint:
checkpoints go by an expert's number. No torch.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from launch.options import Parser
from launch.output import check_out
from launch.recorded import read_single_steps
from moe.config import RunConfig
from moe.placement import Integers, Nodes, Order, orders_of, place, rank_rows
from moe.telemetry.history import History
from moe.telemetry.rows import read_rows, replace_file
from parallel.errors import UserError
from parallel.layout import alternatives
from parallel.pipeline.schedules import FORMS

STEPS = 200
WORTH = 0.005  # share of the busiest ranks' rows from which on a move is recommended


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Rows of some steps: the busiest rank's, over the mean of the ranks, by layer and over all layers."""

    steps: tuple[int, int]  # the first and the last
    before: Mapping[str, float]
    after: Mapping[str, float]
    mean_before: float
    mean_after: float

    @property
    def decrease(self) -> float:
        """The share of the busiest ranks' rows that goes to others."""
        return 1 - self.mean_after / self.mean_before


def main(arguments: Sequence[str]) -> int:
    """Place, write, and show what it is worth; the exit code."""
    options = _parse(arguments)
    config, history = read_single_steps(options.run, options.steps)
    half = len(history.steps) // 2
    if not half:
        raise UserError(
            f"experts must be placed by 2 recorded steps or more, but {options.run} has {len(history.steps)} "
            "of its last ones: train on"
        )
    ep = options.ep or config.layout.ep
    nodes = _nodes(options, config, ep)
    layers = [str(layer) for layer in history.layers]
    before = _present(config, layers, ep)
    after = {
        layer: place(history.counts[:half, index], ep, nodes, before[layer])
        for index, layer in enumerate(layers)
    }
    fitted = _worth(history, slice(None, half), before, after, ep)
    later = _worth(history, slice(half, None), before, after, ep)
    predicted = {
        "fitted": _as_json(fitted),
        "later": _as_json(later),
        "step_time": step_time(options.run, config, history, later, ep),
        "network": _network(history.counts[half:], before, after, nodes.nodes),
    }
    result = {
        "ep": ep,
        "placement": {layer: list(order) for layer, order in after.items()},
        "from": str(options.run),
        "steps": [int(history.steps[0]), int(history.steps[-1])],
        "predicted": predicted,
    }
    replace_file(options.out, json.dumps(result).encode())
    print(_describe(before, after, fitted, later, ep))
    print("\n".join(_sentences(options, config, predicted, later, ep)), flush=True)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("place-experts")
    parser.add_argument("run", type=Path)
    parser.add_argument("--ep", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    for name, least, usual in (("ep", 2, 8), ("gpus_per_node", 1, 8), ("steps", 2, STEPS)):
        value = getattr(options, name)
        if value is not None and value < least:
            said = name.replace("_", "-")
            raise UserError(f"`--{said}` must be at least {least}, but is {value}: use {usual}")
    check_out(options.out)
    return options


def _nodes(options: argparse.Namespace, config: RunConfig, ep: int) -> Nodes:
    """How many nodes a group of expert-parallel ranks reaches over."""
    model, etp = config.model, config.layout.etp
    if ep == 1:
        raise UserError("`--ep` must be at least 2, but is `layout.ep=1` of the run: give it")
    if model.num_experts % ep:
        raise UserError(
            f"`--ep` must divide `model.num_experts`, but {ep} does not divide {model.num_experts}: "
            f"use {alternatives(model.num_experts, ep)}"
        )
    each = options.gpus_per_node or config.cluster.gpus_per_node
    if each >= ep * etp:
        return Nodes(groups=model.num_groups)
    if ep * etp % each or each % etp:
        raise UserError(
            f"`--gpus-per-node` must divide `--ep` x `layout.etp`, which is {ep * etp}, and be a multiple of "
            f"`layout.etp`, but is {each}: give another"
        )
    return Nodes(nodes=ep * etp // each, groups=model.num_groups)


def _present(config: RunConfig, layers: Sequence[str], ep: int) -> dict[str, Order]:
    """Where the experts are: as the run has them, if that is for as many ranks, otherwise in order."""
    found = orders_of(config, ep) if config.layout.ep == ep else {}
    in_order = tuple(range(config.model.num_experts))
    return {layer: found.get(layer, in_order) for layer in layers}


def _worth(
    history: History, part: slice, before: Mapping[str, Order], after: Mapping[str, Order], ep: int
) -> Worth:
    steps, counts = history.steps[part], history.counts[part]
    mean = np.maximum(1, counts.sum(2)).mean(0) / ep
    busiest = {
        moment: np.array(
            [rank_rows(counts[:, i], order, ep).max(1).mean() for i, order in enumerate(orders.values())]
        )
        for moment, orders in (("before", before), ("after", after))
    }
    by_layer = {
        moment: dict(zip(after, (rows / mean).tolist(), strict=True)) for moment, rows in busiest.items()
    }
    return Worth(
        steps=(int(steps[0]), int(steps[-1])),
        **by_layer,
        mean_before=float(busiest["before"].sum() / mean.sum()),
        mean_after=float(busiest["after"].sum() / mean.sum()),
    )


def step_time(run: Path, config: RunConfig, history: History, later: Worth, ep: int) -> float | None:
    """The share of a step's time that is won; None where experts were not timed under as many ranks.

    Of each layer the busiest rank's seconds shrink as its rows do: those of the forward, which is timed, and
    those of the backward, which has twice its products, and once more where it recomputes. Layers of
    different stages run at the same time, and where stages are held twice each copy has half of the
    microbatches.
    """
    seconds = history.expert_seconds
    timed = ~np.isnan(seconds).any((1, 2))
    if seconds.shape[2] != ep or not timed.any():
        return None
    busiest = seconds[timed].max(2).mean(0)
    kept = np.array([later.after[name] / later.before[name] for name in later.after])
    won = float((busiest * (1 - kept)).sum())
    copies = 2 if FORMS[config.layout.schedule].both_ways else 1
    forwards = 4 if config.train.recompute == "full" else 3
    first = int(history.steps[0])
    steps = [
        row["step_seconds"]
        for row in read_rows(run / "metrics.jsonl")
        if row["step"] >= first and "loss" in row
    ]
    return copies * forwards * won / (config.layout.pp * fmean(steps)) if steps else None


def _network(
    counts: Integers, before: Mapping[str, Order], after: Mapping[str, Order], nodes: int
) -> dict[str, float] | None:
    """Rows that cross the network in a step, over all layers; None where one node holds all.

    Ranks send alike, as far as is recorded. So of all rows the same share goes to other nodes wherever
    experts live; what a placement changes is how many come to the busiest node.
    """
    if nodes == 1:
        return None
    away = 1 - 1 / nodes

    def busiest(orders: Mapping[str, Order]) -> float:
        rows = [
            rank_rows(counts[:, i], order, nodes).max(1).mean() for i, order in enumerate(orders.values())
        ]
        return away * float(sum(rows))

    every = away * float(counts.sum((1, 2)).mean())
    return {"rows": every, "busiest_node_before": busiest(before), "busiest_node_after": busiest(after)}


def _as_json(worth: Worth) -> dict[str, Any]:
    return {
        "steps": list(worth.steps),
        "busiest_rank_before": worth.mean_before,
        "busiest_rank_after": worth.mean_after,
        "decrease": worth.decrease,
        "layers": {name: [worth.before[name], worth.after[name]] for name in worth.after},
    }


def _describe(
    before: Mapping[str, Order], after: Mapping[str, Order], fitted: Worth, later: Worth, ep: int
) -> str:
    """A line for each layer: the busiest rank's rows over the mean, before and after, in both halves."""
    decided, then = (f"steps {worth.steps[0]}-{worth.steps[1]}" for worth in (fitted, later))
    lines = [
        f"rows of the busiest rank, over the mean of the ranks: decided by {decided}, and in {then}\n",
        "  layer   before    after       before    after   experts that move",
    ]
    for name in after:
        moved = sum(_rank_of(before[name], ep)[e] != home for e, home in _rank_of(after[name], ep).items())
        lines.append(
            f"  {name:>5}  {fitted.before[name]:7.3f}  {fitted.after[name]:7.3f}      "
            f"{later.before[name]:7.3f}  {later.after[name]:7.3f}   {moved:5}"
        )
    lines.append(
        f"    all  {fitted.mean_before:7.3f}  {fitted.mean_after:7.3f}      "
        f"{later.mean_before:7.3f}  {later.mean_after:7.3f}\n"
    )
    return "\n".join(lines)


def _rank_of(order: Order, ep: int) -> dict[int, int]:
    return {expert: seat * ep // len(order) for seat, expert in enumerate(order)}


def _sentences(
    options: argparse.Namespace, config: RunConfig, predicted: Mapping[str, Any], later: Worth, ep: int
) -> list[str]:
    won, network = predicted["step_time"], predicted["network"]
    if later.decrease <= 0:
        return [
            f"nothing is won: in steps that did not decide, the busiest ranks get {abs(later.decrease):.1%} "
            "more rows; leave the experts where they are, or let more steps decide (`--steps`)"
        ]
    lines = [f"predicted: the busiest ranks get {later.decrease:.1%} fewer rows"]
    if won is None:
        lines[0] += "; what a step gains is not known, as no times were recorded for this `--ep`"
    else:
        lines[0] += f", and a step takes {won:.1%} less time"
    if network is not None:
        lines.append(
            f"network: {network['rows']:,.0f} rows a step wherever experts live; to the busiest node "
            f"{network['busiest_node_before']:,.0f}, then {network['busiest_node_after']:,.0f}"
        )
    if later.decrease < WORTH:
        return [*lines, "not worth a move: the ranks are as evenly loaded as they are now"]
    other = f" layout.ep={ep}" if ep != config.layout.ep else ""
    return [
        *lines,
        f"`switchyard train run={options.run.name}{other} layout.placement={options.out}` moves the experts "
        "as it goes on; a run that has finished needs more `train.steps`",
    ]
