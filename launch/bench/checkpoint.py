"""`switchyard bench checkpoint`: what saving costs training.

One rank trains in rounds of `every` steps: without a save, with one written in the background, and with
one that is waited for, in turn, so that all three see the same machine. The *stall* is how long training
stands still in the save itself; the *cost* is how much longer than a round without a save the whole round
took, the writer's share of the processor included. Both are shares of a round without a save.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from launch.bench.output import parse
from launch.compose import from_recipe
from launch.output import write_json
from moe.config import RunConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.train import state
from moe.train.step import Trainer, make_trainer, open_loader, read_batches
from parallel.groups import single
from parallel.saving import Saver

KINDS = ("none", "background", "waited")


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write the JSON if asked."""
    options = parse("checkpoint", arguments, every=20, rounds=3)
    config = from_recipe("tiny", ["layout.ep=1"])
    result = measure(config, options.every, options.rounds)
    print(f"  {result['bytes'] / 1e6:.1f} MB, a save every {options.every} steps")
    for row in result["rows"]:
        print(
            f"  {row['save']:<12} step {row['step_seconds']:.3f} s   stall {row['stall_seconds']:.3f} s "
            f"= {row['stall_share']:.2%} of the interval   cost {row['cost_share']:+.2%}"
        )
    write_json(options.json, result)
    return 0


def measure(config: RunConfig, every: int, rounds: int) -> dict[str, Any]:
    """A row for each kind of saving: medians over rounds."""
    corpus = prepare(config.data, config.model.vocab_size, print)
    trainer = make_trainer(config, single(), len(corpus.domains), torch.device("cpu"))
    loader = open_loader(corpus.train, config)
    _steps(trainer, loader, 0, 2)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), None, keep_last=1)
        for index in range(rounds * len(KINDS)):
            kind = KINDS[index % len(KINDS)]
            begin = time.perf_counter()
            stall = 0.0
            if kind != "none":
                saver.save(index, state.owned(trainer), {})
                if kind == "waited":
                    saver.wait()
                stall = time.perf_counter() - begin
            _steps(trainer, loader, index * every, every)
            times[kind].append((time.perf_counter() - begin, stall))
            saver.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    without = median(whole for whole, _ in times["none"])
    return {
        "bytes": size,
        "every": every,
        "rows": [_row(kind, times[kind], without, every) for kind in KINDS],
    }


def _steps(trainer: Trainer, loader: Loader, first: int, count: int) -> None:
    for step in range(first, first + count):
        batches = read_batches(loader, trainer.config, trainer.groups, step * trainer.config.train.batch_size)
        trainer.step(0, batches)


def _row(kind: str, times: list[tuple[float, float]], without: float, every: int) -> dict[str, Any]:
    stall = median(stall for _, stall in times)
    return {
        "save": kind,
        "step_seconds": without / every,
        "stall_seconds": stall,
        "stall_share": stall / without,
        "cost_share": median(whole for whole, _ in times) / without - 1.0,
    }
