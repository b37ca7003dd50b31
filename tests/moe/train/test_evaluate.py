"""Validation loss by domain: a mean over exactly the chosen sequences, whatever ranks share them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.model.transformer import Transformer
from moe.train.evaluate import evaluate
from moe.train.sample import sample
from parallel.groups import Groups, build_groups, single
from parallel.layout import Layout
from tests.ranks import run_ranks
from tests.small import small_run

NUM_SEQUENCES = 7  # no multiple of ranks x batch: the last round runs partly on padding


def evaluated(config: RunConfig, groups: Groups) -> dict[str, float]:
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.validation, sequence_length=32, seed=1, mask_documents=False)
    assert loader.sequences_per_epoch > NUM_SEQUENCES
    model = Transformer(config.model, config.balance, groups.ep, seed=3)
    found = evaluate(
        model, loader, groups, corpus.domains, num_sequences=NUM_SEQUENCES, batch_size=2, mask_documents=False
    )
    assert all(not router.last_counts.any() and not router.bias.any() for _, router in model.routers())
    return found


def on_ranks(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, float], list[int]]:
    groups = build_groups(Layout(dp=world_size, ep=world_size))
    model = Transformer(config.model, config.balance, groups.ep, seed=3)
    return evaluated(config, groups), sample(model, [5, 6], 6, groups, context=4, seed=9)


def test_equals_a_plain_mean(tmp_path: Path) -> None:
    """Against logits of the same sequences, one by one."""
    config = small_run(tmp_path, num_mtp_layers=1)
    found = evaluated(config, single())
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.validation, sequence_length=32, seed=1, mask_documents=False)
    model = Transformer(config.model, config.balance, seed=3)
    losses: dict[str, list[float]] = {}
    for number in range(NUM_SEQUENCES):
        batch = loader.batch(number, 1)
        with torch.no_grad():
            each = F.cross_entropy(
                model(batch.tokens)[0], batch.labels[0], reduction="none", ignore_index=-100
            )
        for loss, label, domain in zip(each.tolist(), batch.labels[0], batch.domains[0], strict=True):
            if label != -100:
                losses.setdefault(corpus.domains[domain], []).append(loss)
    expected = {domain: sum(values) / len(values) for domain, values in losses.items()}
    every = [loss for values in losses.values() for loss in values]
    assert found.keys() == {"all", *expected}
    assert found["all"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    for domain, mean in expected.items():
        assert found[domain] == pytest.approx(mean, rel=1e-5)


def test_ranks_agree(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    alone = evaluated(config, single())
    model = Transformer(config.model, config.balance, seed=3)
    text = sample(model, [5, 6], 6, single(), context=4, seed=9)
    assert len(text) == 8 and text[:2] == [5, 6]
    for losses, sampled in run_ranks(4, on_ranks, replace(config, layout=LayoutConfig(dp=4, ep=4))):
        assert losses == pytest.approx(alone, rel=1e-5)
        assert sampled == text
