"""Validation loss by domain: a mean over exactly the chosen sequences, whatever ranks share them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.train.evaluate import evaluate, rounds
from moe.train.sample import sample
from moe.train.step import Trainer
from tests.moe.train.test_step import steps
from tests.ranks import run_ranks
from tests.small import small_run

NUM_SEQUENCES = 7  # no multiple of ranks x batch: the last round runs partly on padding


def evaluated(trainer: Trainer) -> dict[str, float]:
    config = trainer.config
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.validation, sequence_length=32, seed=1, mask_documents=False)
    assert loader.sequences_per_epoch > NUM_SEQUENCES
    batches = rounds(loader, trainer.groups, NUM_SEQUENCES, batch_size=2)
    found = evaluate(trainer.engine, batches, corpus.domains, mask_documents=False)
    for _, router in trainer.model.routers():
        assert not router.last_counts.any() and not router.bias.any()
    return found


def on_ranks(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, float], list[int]]:
    trainer, _ = steps(config, world_size, rank, 0)
    return evaluated(trainer), sample(trainer.engine, [5, 6], 6, context=4, seed=9)


def test_equals_a_plain_mean(tmp_path: Path) -> None:
    """Against logits of the same sequences, one by one."""
    config = small_run(tmp_path, num_mtp_layers=1)
    trainer, _ = steps(config, 1, 0, 0)
    found = evaluated(trainer)
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.validation, sequence_length=32, seed=1, mask_documents=False)
    losses: dict[str, list[float]] = {}
    for number in range(NUM_SEQUENCES):
        batch = loader.batch(number, 1)
        with torch.no_grad():
            each = F.cross_entropy(
                trainer.model(batch.tokens)[0], batch.labels[0], reduction="none", ignore_index=-100
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


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(dp=4, ep=4),
        LayoutConfig(tp=2, cp=2, ep=2, etp=2),
        LayoutConfig(tp=2, pp=2),
        LayoutConfig(cp=2, pp=2, ep=2),
        LayoutConfig(pp=4),
    ],
    ids=str,
)
def test_ranks_agree(tmp_path: Path, layout: LayoutConfig) -> None:
    """Validation losses, and a continued prompt shorter than any multiple that ranks need."""
    config = small_run(tmp_path)
    alone, _ = steps(config, 1, 0, 0)
    text = sample(alone.engine, [5, 6], 6, context=4, seed=9)
    expected = evaluated(alone)
    assert len(text) == 8 and text[:2] == [5, 6]
    for losses, sampled in run_ranks(4, on_ranks, replace(config, layout=layout)):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert sampled == text
