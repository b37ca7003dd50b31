"""`switchyard bench fp8`: what FP8 does to the loss, beside bf16 on the same weights and the same data.

One rank trains recipe `tiny` from several seeds, three times each: in bf16, in bf16 with twice as many
microbatches of half the size, which changes nothing but how sums are rounded, and in fp8. A short training
amplifies any rounding, so a difference means something only beside that of the second from the first.
Compared are mean losses over the last quarter of the steps; where there are no FP8 units the products are
emulated, so that the numbers hold and the times do not.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any, Literal

from launch.bench.output import parse
from launch.compose import from_recipe
from launch.output import write_json
from moe.config import RunConfig
from moe.data.corpus import Corpus, prepare
from moe.train.step import make_trainer, open_loader, read_batches
from moe.train.world import world
from parallel.groups import single

LIMIT = 0.0025  # of the relative difference of the losses, as DeepSeek-V3 reports (2412.19437, section 3.3)


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write the JSON if asked; 1 where the losses are further apart."""
    options = parse("fp8", arguments, steps=200, seeds=3)
    result = measure(small_config(options.steps), options.seeds)
    print(f"  mean losses of the last {result['last']} of {result['steps']} steps")
    print(f"  {'seed':>6} {'bf16':>9} {'regrouped':>16} {'fp8':>16}")
    for row in result["rows"]:
        others = (f"{row[name]:9.4f} {row[name] / row['bf16'] - 1:+.2%}" for name in ("regrouped", "fp8"))
        print(f"  {row['seed']:>6} {row['bf16']:9.4f} {' '.join(others)}", flush=True)
    for name in ("regrouped", "fp8"):
        found = result["differences"][name]
        print(f"  {name} / bf16 - 1: {found['mean']:+.3%}, standard error {found['standard_error']:.3%}")
    error = result["fp8_error"]
    print(f"  greatest error of a layer's products: {'not compared' if error is None else f'{error:.2%}'}")
    print(f"  fp8 is {'within' if result['holds'] else 'beyond'} {LIMIT:.2%} of bf16")
    write_json(options.json, result)
    return 0 if result["holds"] else 1


def small_config(steps: int) -> RunConfig:
    """Recipe `tiny` on one rank."""
    return from_recipe("tiny", ["layout.ep=1", "layout.dp=1", f"train.steps={steps}"])


def measure(config: RunConfig, seeds: int) -> dict[str, Any]:
    """Train from so many seeds; a row of mean losses for each, and how far they are apart."""
    corpus = prepare(config.data, config.model.vocab_size, print)
    last = max(1, config.train.steps // 4)
    rows: list[dict[str, Any]] = []
    errors: list[float] = []
    for seed in range(config.train.seed, config.train.seed + seeds):
        seeded = replace(config, train=replace(config.train, seed=seed))
        runs = {name: _trained(seeded, name, corpus, errors) for name in ("bf16", "regrouped", "fp8")}
        means = {name: fmean(losses[-last:]) for name, losses in runs.items()}
        rows.append({"seed": seed, **means, "losses": runs})
    differences = {name: _difference(rows, name) for name in ("regrouped", "fp8")}
    return {
        "steps": config.train.steps,
        "last": last,
        "rows": rows,
        "fp8_error": max(errors, default=None),
        "differences": differences,
        "holds": abs(differences["fp8"]["mean"]) <= LIMIT,
    }


def _difference(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Of a kind of run from bf16, over the seeds."""
    found = [row[name] / row["bf16"] - 1 for row in rows]
    error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return {"mean": fmean(found), "standard_error": error}


def _trained(config: RunConfig, kind: str, corpus: Corpus, errors: list[float]) -> list[float]:
    """The losses of a run; errors of its FP8 products are added to the list."""
    precision: Literal["bf16", "fp8"] = "fp8" if kind == "fp8" else "bf16"
    config = replace(config, train=replace(config.train, precision=precision))
    if kind == "regrouped":
        config = replace(config, layout=replace(config.layout, microbatches=2 * config.layout.microbatches))
    losses = []
    with world() as device:
        trainer = make_trainer(config, single(), len(corpus.domains), device)
        loader = open_loader(corpus.train, config)
        for step in range(config.train.steps):
            batches = read_batches(loader, config, single(), step * config.train.batch_size)
            result = trainer.step(step, [batch.to(device) for batch in batches])
            losses.append(result.loss)
            errors += result.fp8_errors.values()
    return losses
