"""Validation loss, in all and by domain, over the same sequences every time. Nothing is counted or moved."""

import torch

from moe.data.loader import Loader
from moe.model.mtp import IGNORE
from moe.model.transformer import Microbatch, Transformer
from parallel.collectives import all_reduce
from parallel.groups import Groups
from parallel.pipeline.tape import Direct, run


@torch.no_grad()
def evaluate(
    model: Transformer,
    loader: Loader,
    groups: Groups,
    domains: tuple[str, ...],
    *,
    num_sequences: int,
    batch_size: int,
    mask_documents: bool,
) -> dict[str, float]:
    """Mean loss per token in nats: "all", and each domain that occurs. Every rank must call.

    The first `num_sequences` of the split are shared out in rounds; a rank without work in the last
    round runs on padding, because exchanges need every rank.
    """
    num_sequences = min(num_sequences, loader.sequences_per_epoch)
    device = model.embedding.weight.device
    sums = torch.zeros(2, len(domains), dtype=torch.float64, device=device)
    ranks, rank = groups.layout.dp, groups.rank
    for first in range(
        rank * batch_size, -(-num_sequences // (ranks * batch_size)) * ranks * batch_size, ranks * batch_size
    ):
        batch = loader.batch(first, batch_size)
        real = (torch.arange(first, first + batch_size) < num_sequences)[:, None]
        labels = batch.labels.masked_fill(~real, IGNORE).to(device)
        microbatch = Microbatch(
            tokens=batch.tokens.to(device),
            labels=labels,
            valid=(batch.valid & real).to(device),
            documents=batch.documents.to(device) if mask_documents else None,
            loss_weights=(1.0,) * (1 + len(model.mtp)),
        )
        losses = run(model.phases(Direct(), microbatch)).losses
        predicted = labels != IGNORE
        by_domain = batch.domains.to(device)[predicted]
        sums[0].index_add_(0, by_domain, losses[predicted].double())
        sums[1].index_add_(0, by_domain, torch.ones_like(by_domain, dtype=torch.float64))
    loss, count = all_reduce(sums, groups.dp).tolist()
    means = {name: total / n for name, total, n in zip(domains, loss, count, strict=True) if n}
    return {"all": sum(loss) / max(1.0, sum(count)), **means}
