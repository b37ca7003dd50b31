"""Validation loss, in all and by domain, over the same sequences every time. Nothing is counted or moved."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moe.data.loader import Batch, Loader
from moe.model.mtp import IGNORE
from moe.model.transformer import Microbatch, Outcome, positions_of
from moe.train.engine import Engine
from parallel.collectives import all_reduce
from parallel.groups import Groups


def evaluate(
    engine: Engine, batches: Iterable[Batch], domains: tuple[str, ...], *, mask_documents: bool
) -> dict[str, float]:
    """Mean loss per token of this and the other ranks' batches in nats: "all", and each domain that occurs.

    Every rank must call, with as many batches (see `rounds`).
    """
    groups, device = engine.groups, engine.device
    sums = torch.zeros(2, len(domains), dtype=torch.float64, device=device)
    has_losses = groups.index("tp") == 0  # every rank of a TP group has the same
    for batch in batches:
        batch = batch.to(device)
        documents = batch.documents if mask_documents else None
        outcome = forward(engine, batch.tokens, batch.labels, batch.valid, documents)
        if outcome.losses is None or not has_losses:
            continue
        held = positions_of(batch.labels.shape[1], groups)
        predicted = held.context(batch.labels) != IGNORE
        by_domain = held.context(batch.domains)[predicted]
        sums[0].index_add_(0, by_domain, outcome.losses[predicted].double())
        sums[1].index_add_(0, by_domain, torch.ones_like(by_domain, dtype=torch.float64))
    loss, count = all_reduce(sums, groups.world).tolist()
    means = {name: total / n for name, total, n in zip(domains, loss, count, strict=True) if n}
    return {"all": sum(loss) / max(1.0, sum(count)), **means}


def forward(
    engine: Engine, tokens: Tensor, labels: Tensor, valid: Tensor, documents: Tensor | None = None
) -> Outcome:
    """Run one microbatch, of tensors [B, S], forward: losses and loads as they are. Every rank must call."""
    microbatch = Microbatch(
        tokens=tokens,
        labels=labels,
        valid=valid,
        documents=documents,
        loss_weights=(1.0,) * (1 + engine.model.config.num_mtp_layers),
    )
    (outcome,) = engine.forward([microbatch])
    return outcome


def rounds(loader: Loader, groups: Groups, num_sequences: int | None, batch_size: int) -> Iterator[Batch]:
    """This rank's batches of the first `num_sequences` of a split, at most and with None an epoch.

    They are shared out in rounds of `batch_size` per data-parallel rank. One without work in the last round
    gets padding, because exchanges need every rank.
    """
    epoch = loader.sequences_per_epoch
    num_sequences = epoch if num_sequences is None else min(num_sequences, epoch)
    together = groups.layout.dp * batch_size
    for first in range(groups.index("dp") * batch_size, -(-num_sequences // together) * together, together):
        batch = loader.batch(first, batch_size)
        real = (torch.arange(first, first + batch_size) < num_sequences)[:, None]
        labels = batch.labels.masked_fill(~real, IGNORE)
        yield replace(batch, labels=labels, valid=batch.valid & real)


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
