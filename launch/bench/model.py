"""`switchyard bench model`: whole training steps of recipe `tiny_wide`, beside transformers.

The same initial weights, batches, precision and optimizer (trainers.py says where bf16 differs), steps in
turn in one process. Losses must agree step by step, or nothing is proven: exit code 1. MFU is the model's
own work over the fastest large product that this machine reached in the same run.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from launch.bench import costs
from launch.bench.output import parse
from launch.bench.timing import in_turn, median_ratio, now, peak_bytes, peak_flops, table
from launch.bench.trainers import Contestant, Ours, kept_bytes, transformers_of
from launch.compose import from_recipe
from launch.output import write_json
from moe.config import RunConfig
from moe.data.corpus import prepare
from moe.data.loader import Batch
from moe.model.costs import train_flops_per_token
from moe.train.optim import DTYPES
from moe.train.step import open_loader, read_batches
from moe.train.world import world
from parallel.groups import single

IMPLEMENTATIONS = ("grouped_mm", "eager")  # of transformers' experts; the first is its default
AGREEMENT = {"fp32": 1e-3, "bf16": 2e-2}  # of losses, relative
WITHOUT_AUXILIARY = ("balance.sequence_aux=0",)  # transformers has no auxiliary loss


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables, and write the JSON if asked."""
    options = parse("model", arguments, {"dtype": ("bf16", "fp32")}, rounds=5, threads=0)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = from_recipe("tiny_wide", [*WITHOUT_AUXILIARY, f"train.precision={options.dtype}"])
    with world() as device:
        result = {"recipe": "tiny_wide", **measure(config, options.rounds, device)}
    show(result)
    write_json(options.json, result)
    return 0 if result["losses_agree"] else 1


def measure(config: RunConfig, rounds: int, device: torch.device) -> dict[str, Any]:
    """Steps of every contestant, and what ours loses to what."""
    corpus = prepare(config.data, config.model.vocab_size, print)
    loader = open_loader(corpus.train, config)

    def batch_at(step: int) -> Batch:
        (batch,) = read_batches(loader, config, single(), step * config.train.batch_size)
        return batch.to(device)

    ours = Ours(config, len(corpus.domains), device)
    contestants: list[Contestant] = [ours, *transformers_of(ours, IMPLEMENTATIONS, device)]
    times, losses = _steps(contestants, batch_at, rounds, device)
    peak = peak_flops(DTYPES[config.train.precision], device)
    model, tokens = config.model, batch_at(0).tokens.numel()
    flops = train_flops_per_token(model, config.data.sequence_length)
    rows = []
    for each in contestants:
        rate = tokens / median(times[each.name])
        during = peak_bytes(partial(each.step, rounds + 1, batch_at(rounds + 1)), device)
        rows.append(
            {
                "name": each.name,
                "step_seconds": median(times[each.name]),
                "tokens_per_second": rate,
                "mfu": rate * flops / peak,
                "memory_peak_bytes": kept_bytes(each) + during,
                "ratio_to_ours": median_ratio(times[each.name], times[ours.name]),
                "losses": losses[each.name],
            }
        )
    del contestants[1:]  # their memory
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": config.train.precision,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "parameters": sum(parameter.numel() for parameter in ours.trainer.model.parameters()),
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "measured_peak_flops": peak,
        "losses_agree": agree(losses, AGREEMENT[config.train.precision]),
        "rows": rows,
        "losses_of_speed": costs.measure(ours, corpus.domains, batch_at, rounds, device),
    }


def _steps(
    contestants: Sequence[Contestant], batch_at: Any, rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the counted steps and losses of all, by contestant."""
    by_name = {each.name: each for each in contestants}
    times: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    for index, name in in_turn(list(by_name), rounds):
        batch = batch_at(index)
        begin = now(device)
        losses[name].append(by_name[name].step(index, batch))
        seconds = now(device) - begin
        if index > 0:
            times[name].append(seconds)
    return times, losses


def agree(losses: dict[str, list[float]], tolerance: float) -> bool:
    """Whether all have the same loss at every step, as far as rounding allows."""
    return all(max(step) - min(step) <= tolerance * max(step) for step in zip(*losses.values(), strict=True))


def show(result: dict[str, Any]) -> None:
    """Tables of steps, of losses, and of what costs how much."""
    peak, dtype = result["measured_peak_flops"] / 1e9, result["dtype"]
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters in {dtype}, {result['tokens_per_step']} tokens "
        f"a step, {result['threads']} threads; MFU is of {peak:.0f} GFLOP/s, the fastest product in this run"
    )
    rows = [
        {
            "": row["name"],
            "step s": f"{row['step_seconds']:.3f}",
            "tokens/s": f"{row['tokens_per_second']:.0f}",
            "MFU": f"{row['mfu']:.1%}",
            "peak GB": f"{row['memory_peak_bytes'] / 1e9:.2f}",
            "of ours": f"{row['ratio_to_ours']:.2f}",
            "losses": " ".join(f"{loss:.4f}" for loss in row["losses"]),
        }
        for row in result["rows"]
    ]
    print(*table(rows), sep="\n")
    print("  losses agree" if result["losses_agree"] else "  LOSSES DIFFER: the steps are not the same")
    print("What ours loses, against its own routing with nothing written:")
    rows = [
        {
            "": row["cause"],
            "step s": f"{row['step_seconds']:.3f}",
            "tokens/s": f"{row['tokens_per_second']:.0f}",
            "lost tokens/s": f"{row['lost_tokens_per_second']:+.0f}",
            "lost": f"{row['lost_share']:+.2%}",
        }
        for row in result["losses_of_speed"]
    ]
    print(*table(rows), sep="\n")
