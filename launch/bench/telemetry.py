"""`switchyard bench telemetry`: what watching expert load costs training, at DeepSeek-V2-Lite's 27 layers.

One rank trains a model of its shape at an eighth of the width, 64 experts a layer, with all files of a run
and the alarms. What only watches is timed where it runs, as a share of the whole step; samples that are
taken every few steps count as often as they are.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from launch.bench.output import parse
from launch.compose import from_recipe
from launch.output import write_json
from moe.config import RunConfig
from moe.data.corpus import prepare
from moe.model import router
from moe.train import step as training
from moe.train.counting import Sampling
from moe.train.record import Recorder
from moe.train.step import make_trainer, open_loader, read_batches
from parallel.groups import single

SHAPE = (
    *("model.hidden_size=256", "model.intermediate_size=1368", "model.moe_intermediate_size=176"),
    *("model.num_heads=2", "model.vocab_size=4096", "data.sequence_length=512", "train.batch_size=8"),
    *("layout.ep=1", "layout.microbatches=2", "layout.dp=1", "train.precision=fp32", "train.recompute=none"),
)
EVERYTHING = Sampling(domains=True, pairs=True, times=True)


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write the JSON if asked."""
    options = parse("telemetry", arguments, steps=8)
    result = measure(from_recipe("deepseek_v2_lite_pretrain", SHAPE), options.steps)
    whole = result["step_seconds"]
    print(f"  {result['layers']} layers of {result['experts']} experts, a step of {whole:.2f} s")
    for row in result["rows"]:
        print(f"  {row['part']:<16} {1e3 * row['seconds']:7.2f} ms  {row['share']:.3%}")
    write_json(options.json, result)
    return 0


def measure(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Medians over steps, half of which take every sample."""
    corpus = prepare(config.data, config.model.vocab_size, print)
    trainer = make_trainer(config, single(), len(corpus.domains), torch.device("cpu"))
    loader = open_loader(corpus.train, config)
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder), config, corpus.domains, 0, 1)
        for step in range(1, 2 * rounds + 2):
            batches = read_batches(loader, config, single(), step * config.train.batch_size)
            kind = ("plain", "sampled")[step % 2]
            with _timed(router, "_observe") as signals, _timed(training, "add_up") as counts:
                begin = time.perf_counter()
                result = trainer.step(step - 1, batches, EVERYTHING if kind == "sampled" else Sampling())
            rows = time.perf_counter()
            recorder.step(step, 0, result)
            end = time.perf_counter()
            if step == 1:  # the first one warms up
                continue
            times["step"].append(end - begin)
            times["signals"].append(sum(signals))
            times[f"counts {kind}"].append(sum(counts))
            times[f"rows {kind}"].append(end - rows)
        recorder.close()
    found = {name: median(values) for name, values in times.items()}
    return result_of(config, len(result.layers), found)


def result_of(config: RunConfig, layers: int, found: dict[str, float]) -> dict[str, Any]:
    """Rows of parts from medians by name; samples are weighed with the most frequent one's period."""
    telemetry = config.telemetry
    often = 1 / telemetry.domains_every  # the most frequent of the samples stands for all
    parts = {"router signals": found["signals"]}
    for name in ("counts", "rows"):
        plain = found[f"{name} plain"]
        parts[name] = plain + often * max(0.0, found[f"{name} sampled"] - plain)
    parts["together"] = sum(parts.values())
    whole = found["step"]
    return {
        "layers": layers,
        "experts": config.model.num_experts,
        "step_seconds": whole,
        "rows": [{"part": name, "seconds": part, "share": part / whole} for name, part in parts.items()],
    }


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of every call of a function while the context is open."""
    seconds: list[float] = []
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        returned = function(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return returned

    with patch.object(owner, name, timed):
        yield seconds
