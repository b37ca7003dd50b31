"""`switchyard bench overlap`: how much of the all-to-all is hidden under compute, over a real slow link.

Two hosts are made of network namespaces (launch/network.py), every expert group lies across the link
between them, and a multi-node torchrun trains there: first without a pipeline, then with DualPipe. Where
ranks are more than cores, computing is replaced by sleeping, or one rank would hide another's.
"""

import argparse
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.agents import run_nodes
from launch.bench.output import parse
from launch.compose import from_recipe
from launch.handover import hand_over, take_over
from launch.network import Network, hosts
from launch.output import write_json
from launch.ranks import AS_RANK, rank_command
from moe.config import ScheduleName

RATES = (1.0, 2.0, 0.5)  # of the one at which exchange takes as long as compute
PAUSE_SECONDS = 0.03  # of attention, and of experts, in a layer's forward
MODEL = [
    *("model.num_dense_layers=0", "model.vocab_size=64", "data.sequence_length=128"),
    *("balance.sequence_aux=0", "layout.ep=2", "layout.dp=2"),
]
THIN = [  # next to no work beside the sleeping, but rows as wide
    *("model.moe_intermediate_size=8", "model.num_heads=2", "model.kv_lora_rank=8"),
    *("model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8"),
]


@dataclass(frozen=True)
class Setup:
    """A schedule, how many ranks it takes, and what it trains: four layers on every stage."""

    schedule: ScheduleName
    ranks: int
    layers: int
    sequences: int  # of a microbatch


SETUPS = (Setup("1f1b", 2, 4, 4), Setup("dualpipe", 4, 8, 2))


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write the JSON if asked; or be a rank of it."""
    if arguments[:1] == [AS_RANK]:
        return _be_rank(Path(arguments[1]))
    options = parse("overlap", arguments, rounds=5, microbatches=8, rates=3, delay=0)
    rows = []
    with hosts(2, rate_mbit=1000, delay_ms=options.delay) as network:
        for setup in SETUPS:
            for row in _measure(network, setup, options):
                print(_line(row), flush=True)
                rows.append(row)
    asked = {name: getattr(options, name) for name in ("rounds", "microbatches", "delay")}
    write_json(options.json, {**asked, "rows": rows})
    return 0


def _measure(network: Network, setup: Setup, options: argparse.Namespace) -> list[dict[str, Any]]:
    from launch.bench.hiding import RESULT, HidingPlan, serve  # imports torch

    ranks, count = setup.ranks, options.microbatches
    pause = PAUSE_SECONDS if ranks > len(os.sched_getaffinity(0)) else 0.0
    overrides = [
        *(f"layout.pp={ranks // 2}", f"layout.schedule={setup.schedule}", f"layout.microbatches={count}"),
        *(f"model.num_layers={setup.layers}", f"train.batch_size={2 * setup.sequences * count}"),
    ]
    config = from_recipe("tiny", MODEL + (THIN if pause else []) + overrides)
    plan = HidingPlan(config=config, pause_seconds=pause, rounds=options.rounds, rates=RATES[: options.rates])
    ended = threading.Event()
    with hand_over(plan) as folder:
        dial = threading.Thread(target=serve, args=(folder, network.set_rate, ended.is_set))
        dial.start()
        try:
            # Neighbouring ranks, which share experts, on different hosts; stages on the same.
            nodes = [network.hosts[rank % 2] for rank in range(ranks)]
            code = run_nodes(nodes, rank_command("bench overlap", folder), 1, {})
        finally:
            ended.set()
            dial.join()
        if code:
            raise SystemExit(code)
        rows = json.loads((folder / RESULT).read_text())
    how = "sleeping" if pause else "computing"
    return [{"schedule": setup.schedule, "ranks": ranks, "compute": how} | row for row in rows]


def _line(row: dict[str, Any]) -> str:
    times = ("compute", "exchange", "serial", "overlapped")
    seconds = "  ".join(f"{name} {row[f'{name}_seconds']:6.3f} s" for name in times)
    what = f"{row['schedule']:<9} {row['ranks']} ranks {row['compute']:<9} {row['link_mbit']:7.1f} Mbit/s"
    return f"{what}  {seconds}  hidden {row['hidden_share']:6.1%}"


def _be_rank(folder: Path) -> int:
    from launch.bench.hiding import HidingPlan, measure

    measure(take_over(HidingPlan, folder), folder)
    return 0
