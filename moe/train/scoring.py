"""Scoring experts on a sample of data, to choose those to train (ESFT, arXiv 2407.01906, section 3.2).

Over N tokens the token score of expert i in layer l is (1 / N K) times how often it was chosen, its gate
score (1 / N) times the sum of its gate weights, 0 where it was not chosen. The weights are those of the
scores, without the routed scaling factor: thresholds mean the same for every model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moe.config import ModelConfig, RunConfig
from moe.data.loader import Loader
from moe.model.transformer import Microbatch, expert_layers
from moe.train.engine import Switchyard
from moe.train.evaluate import rounds
from moe.train.state import load_weights
from moe.train.step import make_model
from parallel.checkpoint import Checkpoint
from parallel.collectives import all_reduce
from parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of every expert, by the layer's name; `tokens` that they were taken over."""

    token: Mapping[str, Sequence[float]]
    gate: Mapping[str, Sequence[float]]
    tokens: int


def score(
    config: RunConfig,
    groups: Groups,
    device: torch.device,
    loader: Loader,
    num_sequences: int,
    weights: Checkpoint,
) -> Scores:
    """Run the first `num_sequences` of a split forward. Every rank must call, and gets the same."""
    model = make_model(config, groups)
    load_weights(model, weights)
    engine = Switchyard(model.requires_grad_(False), config, groups, device)  # with nothing to train
    names = expert_layers(config.model)
    sums = torch.zeros(2, len(names), config.model.num_experts, dtype=torch.float64, device=device)
    batch_size = max(1, config.train.batch_size // groups.layout.dp // config.layout.microbatches)
    for batch in rounds(loader, groups, num_sequences, batch_size):
        batch = batch.to(device)
        microbatch = Microbatch(
            tokens=batch.tokens,
            labels=batch.labels,  # without labels MTP modules do not run
            valid=batch.valid,
            documents=batch.documents if config.data.separate_documents else None,
            loss_weights=(1.0,) * (1 + config.model.num_mtp_layers),
        )
        (outcome,) = engine.forward([microbatch])
        for name, load in outcome.loads.items():
            sums[0, names.index(name)] += load.counts_E
            sums[1, names.index(name)] += load.gates_E
    engine.close()
    counts, gates = all_reduce(sums, groups.world).cpu()
    tokens = counts.sum(1, keepdim=True) / config.model.top_k
    shares = counts / (tokens * config.model.top_k), gates / (tokens * gate_scale(config.model))
    token, gate = (dict(zip(names, share.tolist(), strict=True)) for share in shares)
    return Scores(token=token, gate=gate, tokens=int(tokens.max()))


def gate_scale(model: ModelConfig) -> float:
    """What a router multiplies its weights with (router.py)."""
    scales = model.score_function == "sigmoid" or not model.normalize_top_k
    return model.routed_scaling_factor if scales else 1.0
