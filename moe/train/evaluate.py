"""Validation loss, in all and by domain, over the same sequences every time. Nothing is counted or moved."""

import math

import torch

from moe.data.loader import Loader
from moe.model.mtp import IGNORE
from moe.model.transformer import Microbatch, positions_of
from moe.train.engine import Engine
from parallel.collectives import all_reduce


def evaluate(
    engine: Engine,
    loader: Loader,
    domains: tuple[str, ...],
    *,
    num_sequences: int,
    batch_size: int,
    mask_documents: bool,
) -> dict[str, float]:
    """Mean loss per token in nats: "all", and each domain that occurs. Every rank must call.

    The first `num_sequences` of the split are shared out in rounds of `batch_size` per data-parallel rank;
    one without work in the last round runs on padding, because exchanges need every rank.
    """
    num_sequences = min(num_sequences, loader.sequences_per_epoch)
    groups, device = engine.groups, engine.device
    sums = torch.zeros(2, len(domains), dtype=torch.float64, device=device)
    ranks, rank = groups.layout.dp, groups.index("dp")
    has_losses = groups.index("tp") == 0  # every rank of a TP group has the same
    for first in range(
        rank * batch_size, -(-num_sequences // (ranks * batch_size)) * ranks * batch_size, ranks * batch_size
    ):
        batch = loader.batch(first, batch_size).to(device)
        real = (torch.arange(first, first + batch_size, device=device) < num_sequences)[:, None]
        labels = batch.labels.masked_fill(~real, IGNORE)
        microbatch = Microbatch(
            tokens=batch.tokens,
            labels=labels,
            valid=batch.valid & real,
            documents=batch.documents if mask_documents else None,
            loss_weights=(1.0,) * (1 + engine.model.config.num_mtp_layers),
        )
        (outcome,) = engine.forward([microbatch])
        if outcome.losses is None or not has_losses:
            continue
        held = positions_of(labels.shape[1], groups)
        predicted = held.context(labels) != IGNORE
        by_domain = held.context(batch.domains)[predicted]
        sums[0].index_add_(0, by_domain, outcome.losses[predicted].double())
        sums[1].index_add_(0, by_domain, torch.ones_like(by_domain, dtype=torch.float64))
    loss, count = all_reduce(sums, groups.world).tolist()
    means = {name: total / n for name, total, n in zip(domains, loss, count, strict=True) if n}
    return {"all": sum(loss) / max(1.0, sum(count)), **means}


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
