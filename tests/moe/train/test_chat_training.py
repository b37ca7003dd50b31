"""Training on chats: packs change no document's losses, and layouts no step, whatever shapes rows have."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.data.loader import IGNORED, Batch
from moe.model.transformer import Microbatch
from moe.rules import validate
from moe.train.counting import Sampling
from moe.train.step import StepResult, Trainer, make_trainer, open_loader, read_batches
from parallel.groups import build_groups, single
from tests.ranks import run_ranks
from tests.small import WORDS, small_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Conversations of 15 to 200 tokens with short and long answers, in rows of similar length."""
    stream, rows = random.Random(0), []

    def said(most: int) -> str:
        return " ".join(stream.choice(WORDS) for _ in range(stream.randint(1, most)))

    for number in range(48):
        most = (4, 60)[number % 2]
        rows.append({"instruction": said(40), "output": said(most), "domain": f"d{number % 3}"})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = small_run(tmp_path, num_mtp_layers=1)
    data = replace(
        base.data, paths=(str(path),), format="chat", packing="bucket", sequence_length=256, max_bad=0.0
    )
    return replace(base, data=data, layout=LayoutConfig(microbatches=4))


def trainer_of(config: RunConfig, world_size: int = 1) -> Trainer:
    corpus = prepare(config.data, config.model.vocab_size)
    groups = build_groups(validate(config, world_size)) if world_size > 1 else single()
    return make_trainer(config, groups, len(corpus.domains), torch.device("cpu"))


def steps(rank: int, world_size: int, config: RunConfig, count: int) -> tuple[list[Any], list[int]]:
    """What steps give, and the lengths of this rank's microbatches."""
    trainer = trainer_of(config, world_size)
    loader = open_loader(prepare(config.data, config.model.vocab_size).train, config)
    results, lengths = [], []
    for step in range(count):
        batches = read_batches(loader, config, trainer.groups, step * config.train.batch_size)
        lengths += [batch.tokens.shape[1] for batch in batches]
        results.append(facts(trainer.step(step, batches, Sampling(domains=True))))
    list(trainer.engine.owned())  # waits for what is on its way
    return results, lengths


def facts(result: StepResult) -> list[float]:
    counts = [float(count) for layer in result.layers.values() for count in layer.counts]
    return [result.loss, result.mtp_loss, result.auxiliary_loss, result.grad_norm, result.tokens, *counts]


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(dp=2, ep=2, microbatches=2),
        LayoutConfig(pp=2, microbatches=4),
        LayoutConfig(tp=2, ep=2, microbatches=4),
    ],
    ids=str,
)
def test_layouts_take_the_same_steps_in_rows_of_many_lengths(config: RunConfig, layout: LayoutConfig) -> None:
    alone, lengths = steps(0, 1, config, 2)
    assert len(set(lengths)) > 1
    found = run_ranks(2, steps, replace(config, layout=layout), 2)
    assert layout.dp != 2 or found[0][1] != found[1][1]  # also between data-parallel ranks
    for results, _ in found:
        for step, expected in zip(results, alone, strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_trimmed_rows_can_be_cut_by_the_layout(config: RunConfig) -> None:
    config = replace(config, data=replace(config.data, sequence_length=255), layout=LayoutConfig(tp=3))
    loader = open_loader(prepare(config.data, 320).train, config)
    lengths = {loader.batch(first, 2).tokens.shape[1] for first in range(0, 40, 2)}
    assert lengths and lengths <= {192, 255}


def losses(trainer: Trainer, batch: Batch, *, masked: bool) -> torch.Tensor:
    microbatch = Microbatch(
        tokens=batch.tokens,
        labels=batch.labels,
        valid=batch.valid,
        documents=batch.documents if masked else None,
        loss_weights=(1.0, 1.0),
    )
    (outcome,) = trainer.engine.forward([microbatch])
    assert outcome.losses is not None
    return outcome.losses


def test_a_packed_document_has_the_losses_that_it_has_alone(config: RunConfig) -> None:
    """Positions count on inside a pack: RoPE sees only their differences."""
    config = replace(config, data=replace(config.data, packing="whole"))
    assert config.data.separate_documents and not replace(config.data, packing="bucket").separate_documents
    trainer = trainer_of(config)
    batch = open_loader(prepare(config.data, 320).train, config).batch(0, 1)
    together = losses(trainer, batch, masked=True)[0]
    leaking = losses(trainer, batch, masked=False)[0]
    documents = batch.documents[0]
    assert int(documents.max()) >= 2
    for document in range(1, int(documents.max()) + 1):
        inside = documents == document
        cut = {name: tensor[:, inside] for name, tensor in vars(batch).items()}
        alone = losses(trainer, Batch(**cut), masked=False)[0]
        assert int((cut["labels"] != IGNORED).sum())
        torch.testing.assert_close(together[inside], alone, rtol=0, atol=1e-5)
        assert not torch.allclose(leaking[inside], alone, rtol=0, atol=1e-5)


def unequal(config: RunConfig) -> Batch:
    """Eight rows: one learns all it can, most a single token, and two nothing."""
    batch = open_loader(prepare(config.data, 320).train, config).batch(0, 8)
    labels = batch.labels.clone()
    labels[6:] = IGNORED
    for row in range(1, 6):
        labels[row, (labels[row] != IGNORED).nonzero().flatten()[1:]] = IGNORED
    return replace(batch, labels=labels)


def unequal_step(rank: int, world_size: int, config: RunConfig, parts: int) -> tuple[float, float]:
    trainer, whole = trainer_of(config, world_size), unequal(config)
    size = 8 // world_size // parts
    starts = [(rank * parts + part) * size for part in range(parts)]
    batches = [
        Batch(**{name: tensor[start : start + size] for name, tensor in vars(whole).items()})
        for start in starts
    ]
    result = trainer.step(0, batches)
    list(trainer.engine.owned())
    return result.loss, result.grad_norm


def test_every_learnt_token_counts_the_same(config: RunConfig) -> None:
    """However rows are shared out; a microbatch that learns nothing adds nothing."""
    balance = replace(config.balance, sequence_aux=0.0)
    layouts = {parts: replace(config.layout, microbatches=parts) for parts in (1, 2, 4)}
    configs = {n: replace(config, balance=balance, layout=layout) for n, layout in layouts.items()}
    assert (unequal(config).labels[6:] == IGNORED).all()
    alone = unequal_step(0, 1, configs[1], 1)
    for parts in (2, 4):
        assert unequal_step(0, 1, configs[parts], parts) == pytest.approx(alone, rel=1e-5)
    spread = replace(configs[2], layout=LayoutConfig(dp=2, microbatches=2))
    for found in run_ranks(2, unequal_step, spread, 2):
        assert found == pytest.approx(alone, rel=1e-5)
    nothing = replace(unequal(config), labels=torch.full_like(unequal(config).labels, IGNORED))
    empty = trainer_of(configs[1]).step(0, [nothing])
    assert empty.loss == 0.0 and empty.grad_norm == 0.0
