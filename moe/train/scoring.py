"""Scoring experts on a sample of data, to choose those to train (ESFT, arXiv 2407.01906, section 3.2)."""

from collections.abc import Iterable

import torch

from moe.data.loader import Batch
from moe.model.transformer import expert_layers
from moe.selection import Scores, gate_scale
from moe.train.engine import Engine
from moe.train.evaluate import forward
from parallel.collectives import all_reduce


def score(engine: Engine, batches: Iterable[Batch], *, separate_documents: bool) -> Scores:
    """Run all ranks' batches forward. Every rank must call (see `rounds`), and gets the same."""
    config = engine.model.config
    names = expert_layers(config)
    sums = torch.zeros(2, len(names), config.num_experts, dtype=torch.float64, device=engine.device)
    for batch in batches:
        batch = batch.to(engine.device)
        documents = batch.documents if separate_documents else None
        # Without labels MTP modules would not run.
        outcome = forward(engine, batch.tokens, batch.labels, batch.valid, documents)
        for name, load in outcome.loads.items():
            sums[0, names.index(name)] += load.counts_E
            sums[1, names.index(name)] += load.gates_E
    counts, gates = all_reduce(sums, engine.groups.world).cpu()
    tokens = counts.sum(1, keepdim=True) / config.top_k
    shares = counts / (tokens * config.top_k), gates / (tokens * gate_scale(config))
    token, gate = (dict(zip(names, share.tolist(), strict=True)) for share in shares)
    return Scores(token=token, gate=gate, tokens=int(tokens.max()))
