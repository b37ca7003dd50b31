"""`switchyard bench balance`: expert load with and without the selection bias, from one skewed start.

Both runs begin with the same weights, in which every router favours two experts for all tokens, and
read the same real text. Reported is MaxVio of the summed counts over the last quarter of the steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from launch.bench.output import parse
from launch.compose import from_recipe
from launch.output import write_json
from moe.config import BalanceConfig, RunConfig
from moe.data.corpus import Corpus, prepare
from moe.data.loader import Loader
from moe.model.transformer import Transformer
from moe.telemetry.load import max_vio
from moe.train.step import Trainer
from parallel.groups import single

FAVOURED = 2  # experts per layer
SKEW = 4.0  # by how much a favoured expert's logit leads on the mean token


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write the JSON if asked."""
    options = parse("balance", arguments, steps=200)
    result = measure(small_config(options.steps))
    for row in result["rows"]:
        print(f"  bias {row['bias']:<8} MaxVio first step {row['first']:6.3f}   tail {row['tail']:6.3f}")
    print(f"  tail with the bias / without: {result['ratio']:.3f}")
    write_json(options.json, result)
    return 0


def small_config(steps: int) -> RunConfig:
    """Recipe `tiny` at a size of which two runs on one core take about a minute."""
    overrides = [
        *("layout.ep=1", "layout.microbatches=1", "balance.sequence_aux=0", f"train.steps={steps}"),
        *("train.batch_size=16", "data.sequence_length=64", "model.hidden_size=128"),
        *("model.intermediate_size=256", "model.moe_intermediate_size=64"),
    ]
    return from_recipe("tiny", overrides)


def measure(config: RunConfig) -> dict[str, Any]:
    """Train with the bias updated and without it; rows by bias, and the ratio of their tails."""
    corpus = prepare(config.data, config.model.vocab_size, print)
    rows = [_trained(config, replace(config.balance, bias=bias), corpus) for bias in ("update", "none")]
    return {"steps": config.train.steps, "rows": rows, "ratio": rows[0]["tail"] / rows[1]["tail"]}


def _trained(config: RunConfig, balance: BalanceConfig, corpus: Corpus) -> dict[str, Any]:
    config = replace(config, balance=balance)
    model = Transformer(config.model, config.balance, seed=config.train.seed)
    loader = Loader(
        corpus.train,
        sequence_length=config.data.sequence_length,
        seed=config.train.seed,
        mask_documents=False,
    )
    _skew(model, loader.batch(0, config.train.batch_size).tokens)
    trainer = Trainer(model, config, single(), len(corpus.domains))
    counts = []
    for step in range(config.train.steps):
        batch = loader.batch(step * config.train.batch_size, config.train.batch_size)
        layers = trainer.step(step, [batch]).layers
        counts.append(torch.stack([layer.counts for layer in layers.values()]))
    tail = torch.stack(counts[-max(1, len(counts) // 4) :]).sum(0)
    return {"bias": balance.bias, "first": _mean_max_vio(counts[0]), "tail": _mean_max_vio(tail)}


def _mean_max_vio(counts_LE: Tensor) -> float:
    return sum(max_vio(counts.tolist()) for counts in counts_LE) / len(counts_LE)


@torch.no_grad()
def _skew(model: Transformer, tokens: Tensor) -> None:
    """Turn the first experts of every router towards the mean hidden state it sees."""
    means: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        means[module] = inputs[0].flatten(0, 1).mean(0)

    routers = [router for _, router in model.routers()]
    hooks = [router.register_forward_pre_hook(remember) for router in routers]
    model(tokens)
    for hook in hooks:
        hook.remove()
    for router in routers:
        mean = means[router]
        router.projection.weight[:FAVOURED] += SKEW * mean / mean.square().sum()
