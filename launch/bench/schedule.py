"""`switchyard bench schedule`: whether schedules take as long as the simulator says, on real ranks.

One rank per process and one thread per rank; stages sleep instead of computing (launch/bench/walks.py).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.bench.output import parse
from launch.handover import hand_over, take_over
from launch.output import write_json
from launch.ranks import AS_RANK, rank_command
from launch.schedule import FOLDER
from parallel.pipeline.schedules import make_all

SECONDS = 0.04  # of a forward of a rank's share; its backward takes twice as long


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, draw, and write the JSON if asked; or be a rank of it."""
    if arguments[:1] == [AS_RANK]:
        return _be_rank(Path(arguments[1]))
    options = parse("schedule", arguments, ranks=8, microbatches=16, rounds=5)
    from launch.bench.walks import RESULT, WalksPlan  # imports torch
    from launch.local import start_ranks

    made, left_out = make_all(options.ranks, options.microbatches)
    for reason in left_out.values():
        print(f"left out: {reason}")
    FOLDER.mkdir(exist_ok=True)
    plan = WalksPlan(
        schedules=tuple(made),
        ranks=options.ranks,
        microbatches=options.microbatches,
        rounds=options.rounds,
        seconds=SECONDS,
        out=str(FOLDER.resolve()),
    )
    with hand_over(plan) as folder:
        code = start_ranks(plan.ranks, rank_command("bench schedule", folder), 1)
        if code:
            return code
        rows = json.loads((folder / RESULT).read_text())
    for row in rows:
        print(_line(row))
    print(f"drawn: {FOLDER}/measured-NAME-{plan.ranks}-{plan.microbatches}.png")
    write_json(options.json, {**asdict(plan), "rows": rows})
    return 0


def _line(row: dict[str, Any]) -> str:
    simulated, measured = row["simulated_seconds"], row["measured_seconds"]
    return (
        f"{row['schedule']:<13} simulated {simulated:6.3f} s  measured {measured:6.3f} s  "
        f"measured / simulated {row['ratio']:.3f}"
    )


def _be_rank(folder: Path) -> int:
    from launch.bench.walks import WalksPlan, measure

    measure(take_over(WalksPlan, folder), folder)
    return 0
