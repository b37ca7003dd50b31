"""One optimizer step: the same under every layout, order and memory setting, and counted exactly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.config import BalanceConfig, LayoutConfig, RunConfig, ScheduleName
from moe.data.corpus import prepare
from moe.data.loader import Batch, Loader
from moe.rules import validate
from moe.train.counting import Sampling, count_by_domain
from moe.train.step import StepResult, Trainer, make_trainer, read_batches
from parallel.groups import build_groups, single
from tests.ranks import run_ranks
from tests.small import small_run


def steps(config: RunConfig, world_size: int, rank: int, count: int) -> tuple[Trainer, list[StepResult]]:
    """Train `count` steps on this rank's share of the corpus, under the layout of the settings."""
    corpus = prepare(config.data, config.model.vocab_size)
    groups = build_groups(validate(config, world_size)) if world_size > 1 else single()
    trainer = make_trainer(config, groups, len(corpus.domains), torch.device("cpu"))
    return trainer, steps_from(trainer, 0, count)


def steps_from(trainer: Trainer, first: int, count: int) -> list[StepResult]:
    """Steps `first` .. `first + count - 1`."""
    config = trainer.config
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)
    results = []
    for step in range(first, first + count):
        batches = read_batches(loader, config, trainer.groups, step * config.train.batch_size)
        results.append(trainer.step(step, batches, Sampling(domains=True)))
    list(trainer.engine.owned())  # waits for what is on its way
    return results


def facts(trainer: Trainer, results: list[StepResult]) -> dict[str, torch.Tensor]:
    """Everything a step decides, as tensors."""
    every = {
        "loss": torch.tensor([r.loss for r in results]),
        "mtp_loss": torch.tensor([r.mtp_loss for r in results]),
        "auxiliary_loss": torch.tensor([r.auxiliary_loss for r in results]),
        "grad_norm": torch.tensor([r.grad_norm for r in results]),
    }
    for name, layer in results[-1].layers.items():
        assert layer.domains is not None
        every |= {f"{name} counts": layer.counts, f"{name} domains": layer.domains}
        every[f"{name} bias"] = layer.bias
    return every


def on_ranks(rank: int, world_size: int, config: RunConfig, count: int) -> dict[str, torch.Tensor]:
    return facts(*steps(config, world_size, rank, count))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_run(tmp_path, num_mtp_layers=1)


@pytest.mark.parametrize(("dp", "ep"), [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_layouts_take_the_same_steps(config: RunConfig, dp: int, ep: int) -> None:
    """Loss, auxiliary loss (not scaled by ranks), norm (each element once), counts and bias."""
    balance = replace(config.balance, microbatch_aux=1e-2, global_aux=1e-2)
    config = replace(config, balance=balance, layout=LayoutConfig(microbatches=4))
    alone = facts(*steps(config, 1, 0, 5))
    spread = replace(config, layout=LayoutConfig(dp=dp, ep=ep, microbatches=4 // dp))
    for found in run_ranks(dp, on_ranks, spread, 5):
        for name, expected in alone.items():
            torch.testing.assert_close(
                found[name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_pairs_change_no_bit(config: RunConfig, schedule: ScheduleName) -> None:
    """And both are one rank's steps, to rounding, where a stage has no experts and another none but MTP's."""
    alone = facts(*steps(replace(config, layout=LayoutConfig(microbatches=8)), 1, 0, 3))
    both_ways = LayoutConfig(pp=2, dp=2, ep=2, microbatches=4, schedule=schedule)
    paired = run_ranks(4, on_ranks, replace(config, layout=both_ways), 3)
    serial = run_ranks(4, on_ranks, replace(config, layout=replace(both_ways, overlap=False)), 3)
    for first, second in zip(paired, serial, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in alone)
        for name, expected in alone.items():
            torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", ["overlap", "recompute", "again"])
def test_bit_equal(config: RunConfig, change: str) -> None:
    """Stepping microbatches in turn, recomputation and a second run change no bit."""
    other = {
        "overlap": replace(config, layout=replace(config.layout, overlap=False)),
        "recompute": replace(config, train=replace(config.train, recompute="full")),
        "again": config,
    }[change]
    first, second = facts(*steps(config, 1, 0, 3)), facts(*steps(other, 1, 0, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulation_changes_no_mean(config: RunConfig) -> None:
    """One microbatch of 8 and four of 2 sequences: losses and the sequence loss are means over the batch."""
    one = facts(*steps(replace(config, layout=LayoutConfig(microbatches=1)), 1, 0, 2))
    four = facts(*steps(replace(config, layout=LayoutConfig(microbatches=4)), 1, 0, 2))
    for name, expected in one.items():
        torch.testing.assert_close(four[name], expected, rtol=1e-5, atol=1e-7)


def padded(batch: Batch, real: int) -> Batch:
    valid = batch.valid.clone()
    valid[:, real:] = False
    return replace(batch, valid=valid, labels=batch.labels.masked_fill(~valid, -100))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_conservation(config: RunConfig, recompute: str) -> None:
    """Counts are valid tokens x K in every layer, under accumulation, padding and recomputation."""
    config = replace(config, train=replace(config.train, recompute=recompute))
    trainer, _ = steps(config, 1, 0, 0)
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)
    batches = [padded(loader.batch(4 * i, 4), 20) for i in range(3)]
    valid = sum(int(b.valid.sum()) for b in batches)
    result = trainer.step(0, batches, Sampling(domains=True))
    assert set(result.layers) == {"1", "2", "mtp0"}
    for name, layer in result.layers.items():
        ahead = 1 if name == "mtp0" else 0  # the last real token of a sequence has none ahead of it
        expected = (valid - ahead * 12) * config.model.top_k
        assert int(layer.counts.sum()) == int(layer.rank_rows.sum()) == expected
        assert layer.domains is not None
        assert torch.equal(layer.domains.sum(0), layer.counts)
    assert result.tokens == valid


def test_bias_follows_global_counts(config: RunConfig) -> None:
    """Every router, MTP's too, moves against its own counts once per step."""
    trainer, (result,) = steps(config, 1, 0, 1)
    for name, router in trainer.model.routers():
        counts = result.layers[name].counts.double()
        expected = config.balance.bias_rate * torch.sign(counts.mean() - counts)
        torch.testing.assert_close(router.bias.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", ["frozen", "none"])
def test_frozen_bias_does_not_drift(config: RunConfig, bias: str) -> None:
    trainer, _ = steps(replace(config, balance=BalanceConfig(bias=bias)), 1, 0, 2)  # type: ignore[arg-type]
    assert all(not router.bias.any() for _, router in trainer.model.routers())


def test_capacity_drops_are_counted(config: RunConfig) -> None:
    """Dropped assignments stay in the counts; rows say what was sent."""
    tight = replace(config, model=replace(config.model, capacity_factor=0.5))
    _, (result,) = steps(tight, 1, 0, 1)
    for layer in result.layers.values():
        dropped = int(layer.counts.sum() - layer.rank_rows.sum())
        assert dropped >= int(layer.counts.sum()) * 0.4


def test_no_layer_of_experts(config: RunConfig) -> None:
    dense = replace(config, model=replace(config.model, num_dense_layers=3, num_mtp_layers=0))
    _, results = steps(dense, 1, 0, 2)
    assert results[1].loss < results[0].loss
    assert results[0].layers == {}


def test_bf16_keeps_fp32_masters(config: RunConfig) -> None:
    """A step too small for bf16 still moves the master."""
    config = replace(
        config,
        optim=replace(config.optim, lr=1e-7, warmup_steps=0, weight_decay=0.0),
        train=replace(config.train, precision="bf16"),
    )
    trainer, _ = steps(config, 1, 0, 0)
    before = {p.name: p.tensor.clone() for p in trainer.engine.owned() if p.name.startswith("master/")}
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)
    trainer.step(0, [loader.batch(0, 8)])
    after = {piece.name: piece.tensor for piece in trainer.engine.owned()}
    assert before and all(tensor.dtype == torch.float32 for tensor in before.values())
    moved = [not torch.equal(before[name], after[name]) for name in before]
    assert sum(moved) > 0.9 * len(moved)


def test_count_by_domain() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [4, 4]])  # the last token is padding
    domains = torch.tensor([[0, 1, 1]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])
    assert torch.equal(count_by_domain(experts, domains, 2, 4), expected)
