"""Silent errors that users of other systems met where parallel dimensions meet, each asked of ours.

Every test runs real steps on several ranks and compares with one rank. The docstrings name the class of
error and where it was reported.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe.config import LayoutConfig, RunConfig, TuneConfig
from moe.data.corpus import prepare
from moe.data.loader import Batch, Loader
from moe.rules import validate
from moe.train import state
from moe.train.counting import LayerCounts, Sampling
from moe.train.step import StepResult, Trainer, make_trainer, read_batches
from parallel.checkpoint import open_checkpoint
from parallel.groups import build_groups, single
from parallel.saving import Saver
from parallel.shards import pieces
from tests.ranks import run_ranks
from tests.reduced import ranks_of
from tests.small import small_run

STEPS = 2  # the second with what the first one moved
EVERY_AXIS = LayoutConfig(tp=2, pp=2, dp=2, ep=2, microbatches=2)  # 8 ranks
RING = LayoutConfig(tp=2, cp=2, ep=2, etp=2, microbatches=4)  # 4 ranks


class Facts(NamedTuple):
    """What a rank knows after some steps; gradients are those pieces that it owns."""

    results: list[StepResult]
    gradients: list[tuple[str, tuple[slice, ...], Tensor]]


Plain = Callable[[LayoutConfig], tuple[Facts, list[Facts]]]


def trainer_of(config: RunConfig, world_size: int) -> Trainer:
    groups = build_groups(validate(config, world_size)) if world_size > 1 else single()
    return make_trainer(config, groups, 3, torch.device("cpu"))


def padded(batch: Batch, real: int) -> Batch:
    """Sequences of which only the first positions are real; what stands behind must not matter."""
    valid = batch.valid & (torch.arange(batch.valid.shape[1]) < real)
    return replace(batch, valid=valid, labels=batch.labels.masked_fill(~valid, -100))


def train(rank: int, world_size: int, config: RunConfig, real: int = 32, tilt: float = 0.0) -> Facts:
    """Some steps; with `tilt` the first half of the experts is out of every token's reach."""
    trainer = trainer_of(config, world_size)
    for _, router in trainer.model.routers():
        router.bias[: len(router.bias) // 2] -= tilt
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)
    results = []
    for step in range(STEPS):
        read = read_batches(loader, config, trainer.groups, step * config.train.batch_size)
        batches = [padded(batch, real) for batch in read]
        results.append(trainer.step(step, batches, Sampling(domains=True)))
    owned = [
        (piece.name, piece.place, piece.tensor)
        for segment in trainer.engine.zero.segments()
        for piece in pieces(segment.name, segment.parameter, segment.grad, segment.begin)
    ]
    return Facts(results, owned)


def both(config: RunConfig, layout: LayoutConfig, **given: Any) -> tuple[Facts, list[Facts]]:
    """One rank's facts with the same microbatches, and every rank's under the layout."""
    parts = (layout.dp or 1) * layout.microbatches
    alone = train(0, 1, replace(config, layout=LayoutConfig(microbatches=parts)), **given)
    spread = replace(config, layout=layout)
    return alone, run_ranks(ranks_of(layout), _train_with, spread, given)


def _train_with(rank: int, world_size: int, config: RunConfig, given: dict[str, Any]) -> Facts:
    return train(rank, world_size, config, **given)


def assert_same_gradients(alone: Facts, ranks: list[Facts], bound: float = 1e-3) -> None:
    """After some steps; whoever owns what, everything once."""
    expected = {name: tensor for name, _, tensor in alone.gradients}
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    for facts in ranks:
        for name, place, tensor in facts.gradients:
            found[name][place] = tensor
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= bound * tensor.norm(), name


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("small"), num_mtp_layers=1)


@pytest.fixture(scope="module")
def plain(config: RunConfig) -> Plain:
    """`both` without anything special: several tests look at the same run."""
    return lru_cache(partial(both, config))


@pytest.mark.parametrize("layout", [EVERY_AXIS, RING], ids=["every axis", "ring"])
def test_recomputation_and_accumulation_count_nothing_twice(
    config: RunConfig, plain: Plain, layout: LayoutConfig
) -> None:
    """Class 2.1: counts and auxiliary losses doubled (Megatron #1330, #1478; torchtitan #1593)."""
    recomputed = replace(config, train=replace(config.train, recompute="full"))
    alone, stored = plain(layout)
    again = run_ranks(ranks_of(layout), _train_with, replace(recomputed, layout=layout), {})
    for facts in (*stored, *again):
        for found, expected in zip(facts.results, alone.results, strict=True):
            assert found.auxiliary_loss == pytest.approx(expected.auxiliary_loss, rel=1e-5)
            assert set(found.layers) == {"1", "2", "mtp0"}
            for name, layer in found.layers.items():
                assert torch.equal(layer.counts, expected.layers[name].counts)
                _assert_same_signals(layer, expected.layers[name])
                valid = found.tokens - (config.train.batch_size if name == "mtp0" else 0)
                assert int(layer.counts.sum()) == int(layer.rank_rows.sum()) == valid * config.model.top_k
    for first, second in zip(stored, again, strict=True):  # and recomputation changes no bit
        assert [result.loss for result in first.results] == [result.loss for result in second.results]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(first.gradients, second.gradients, strict=True))


def _assert_same_signals(layer: LayerCounts, expected: LayerCounts) -> None:
    """What is averaged over tokens or microbatches, wherever they are."""
    torch.testing.assert_close(layer.gates, expected.gates, rtol=1e-4, atol=0)
    for name in ("logit_rms", "logit_max", "margin", "group_limited"):
        assert getattr(layer, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert layer.max_vio_microbatch == pytest.approx(expected.max_vio_microbatch, rel=1e-12)
    assert int(layer.links.sum()) == int(layer.rank_rows.sum())


@pytest.mark.parametrize("dense", [1, 2, 3])
def test_stages_without_experts_or_layers_do_not_hang(config: RunConfig, dense: int) -> None:
    """Class 2.2: Megatron #1444, torchtitan #1689 and #1558, NeMo-RL #3419.

    Four stages of three layers: the first `dense` hold no experts, the last no layer, only head and MTP.
    """
    config = replace(config, model=replace(config.model, num_dense_layers=dense))
    alone, ranks = both(config, LayoutConfig(pp=4, dp=2, ep=2, microbatches=2))
    for facts in ranks:
        assert [r.loss for r in facts.results] == pytest.approx([r.loss for r in alone.results], rel=1e-5)
        assert set(facts.results[0].layers) == set(alone.results[0].layers)
    assert_same_gradients(alone, ranks)


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(dp=4, ep=4, microbatches=2),
        LayoutConfig(tp=2, dp=2, ep=4, microbatches=2),
        LayoutConfig(tp=2, dp=2, microbatches=2),  # ep and etp 1 under tp 2: Megatron's is silently wrong
        LayoutConfig(tp=2, ep=2, etp=1, microbatches=2),
        RING,
        EVERY_AXIS,
    ],
    ids=["ep4", "tp2·ep4", "tp2", "tp2·ep2·etp1", "ring", "every axis"],
)
def test_gradients_are_scaled_and_normed_once(plain: Plain, layout: LayoutConfig) -> None:
    """Class 2.3: PyTorch #160285, Megatron #5916, SpecForge #882 (norm √EP too big), torchtitan #2387."""
    alone, ranks = plain(layout)
    for facts in ranks:
        norms = [result.grad_norm for result in facts.results]
        assert norms == pytest.approx([result.grad_norm for result in alone.results], rel=1e-5)
    assert_same_gradients(alone, ranks)


@pytest.mark.parametrize("layout", [LayoutConfig(dp=4, ep=4, microbatches=2), RING], ids=["ep4", "ring"])
def test_experts_without_tokens_take_part(config: RunConfig, layout: LayoutConfig) -> None:
    """Class 2.3: None for a gradient or a hang where an expert or a rank gets no row (Automodel #2995)."""
    alone, ranks = both(config, layout, tilt=9.0)
    assert not alone.results[0].layers["1"].counts[:4].any()
    idle = [name for name, _, tensor in alone.gradients if not tensor.any()]
    assert len(idle) == 3 * 4 * 2 and all(".experts." in name for name in idle)
    for facts in ranks:
        for name, _, tensor in facts.gradients:
            assert name not in idle or not tensor.any()
    assert_same_gradients(alone, ranks)


@pytest.mark.parametrize("kind", ["sequence_aux", "microbatch_aux", "global_aux"])
@pytest.mark.parametrize("layout", [EVERY_AXIS, RING], ids=["every axis", "ring"])
def test_auxiliary_losses_weigh_the_same(config: RunConfig, layout: LayoutConfig, kind: str) -> None:
    """Class 2.4: Megatron #1652, #7452 (doubled by a TP all-reduce in place), MTP's scale (PR #56).

    Strong enough to rule the routers' gradients; MTP's layer included.
    """
    balance = replace(config.balance, **{"sequence_aux": 0.0, kind: 1.0})
    alone, ranks = both(replace(config, balance=balance), layout)
    assert alone.results[0].auxiliary_loss > 1.0
    for facts in ranks:
        for found, expected in zip(facts.results, alone.results, strict=True):
            assert found.auxiliary_loss == pytest.approx(expected.auxiliary_loss, rel=1e-5)
    assert_same_gradients(alone, ranks)


@pytest.mark.parametrize(
    "layout", [LayoutConfig(tp=2, etp=2, microbatches=4), RING], ids=["tp2·etp2", "ring"]
)
def test_adapters_of_cut_experts_are_summed_over_their_parts(config: RunConfig, layout: LayoutConfig) -> None:
    """Class 2.3: expert LoRA is wrong at ETP > 1 (Megatron-Bridge #5634): of a pair one is whole there."""
    balance, tune = replace(config.balance, bias="frozen"), TuneConfig(method="lora", lora_rank=4)
    alone, ranks = both(replace(config, balance=balance, tune=tune), layout)
    assert all(".lora." in name for name, _, _ in alone.gradients)
    for facts in ranks:
        assert [r.loss for r in facts.results] == pytest.approx([r.loss for r in alone.results], rel=1e-5)
        norms = [result.grad_norm for result in facts.results]
        assert norms == pytest.approx([result.grad_norm for result in alone.results], rel=1e-5)
    assert_same_gradients(alone, ranks)


@pytest.mark.parametrize("layout", [EVERY_AXIS, RING], ids=["every axis", "ring"])
def test_padding_is_neither_routed_nor_counted(config: RunConfig, layout: LayoutConfig) -> None:
    """Class 2.5: Megatron #1984, #4776; torchtitan #4594. Some ranks of a cut sequence hold only padding."""
    alone, ranks = both(config, layout, real=11)
    for facts in ranks:
        for found, expected in zip(facts.results, alone.results, strict=True):
            assert found.tokens == expected.tokens == 11 * config.train.batch_size
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)
            for name, layer in found.layers.items():
                valid = (10 if name == "mtp0" else 11) * config.train.batch_size
                assert int(layer.counts.sum()) == valid * config.model.top_k
                assert torch.equal(layer.counts, expected.layers[name].counts)
                assert layer.domains is not None
                assert torch.equal(layer.domains, expected.layers[name].domains)
    assert_same_gradients(alone, ranks)


@pytest.mark.parametrize("layout", [EVERY_AXIS, RING], ids=["every axis", "ring"])
def test_the_bias_follows_all_distinct_tokens_once(plain: Plain, layout: LayoutConfig) -> None:
    """Class 2.6: counts over too few or too many ranks; MTP's layer skipped (torchtitan #4494)."""
    alone, ranks = plain(layout)
    for facts in ranks:  # every rank knows every stage's
        for found, expected in zip(facts.results, alone.results, strict=True):
            for name, layer in expected.layers.items():
                assert torch.equal(found.layers[name].bias, layer.bias)
                assert layer.bias.any()


@pytest.mark.parametrize("bias", ["frozen", "none"])
def test_a_frozen_bias_stays(config: RunConfig, bias: str) -> None:
    """Class 2.6: a frozen router still drifts (Megatron #4785)."""
    balance = replace(config.balance, bias=bias)
    spread = replace(config, layout=EVERY_AXIS, balance=balance)
    for facts in run_ranks(8, _train_with, spread, {}):
        assert not any(layer.bias.any() for layer in facts.results[-1].layers.values())


def save(rank: int, world_size: int, config: RunConfig, folder: Path) -> None:
    trainer = trainer_of(config, world_size)
    for _, router in trainer.model.routers():
        router.bias.copy_(torch.arange(8))
    saver = Saver(folder, trainer.groups.world, keep_last=1)
    saver.save(1, state.owned(trainer), {"step": 1, "sequences": 8, "tokens": 9})
    saver.wait()


@pytest.mark.parametrize("layout", [EVERY_AXIS, RING], ids=["every axis", "ring"])
def test_a_checkpoint_holds_every_expert_and_bias(
    config: RunConfig, layout: LayoutConfig, tmp_path: Path
) -> None:
    """Class 2.8: one rank's experts saved (KempnerForge #202), ETP is not TP (Megatron #1719), bias lost."""
    run_ranks(ranks_of(layout), save, replace(config, layout=layout), tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved" / "step-1")
    alone = trainer_of(config, 1)
    state.load(alone, saved)
    fresh = trainer_of(config, 1)
    for (name, parameter), (_, other) in zip(
        fresh.model.named_parameters(), alone.model.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name
    for _, router in alone.model.routers():
        assert router.bias.tolist() == list(range(8))


def test_the_same_run_twice_is_bit_equal(config: RunConfig, plain: Plain) -> None:
    """Class 2.12: Megatron #2369, #1881; torchtitan #1720."""
    _, first = plain(EVERY_AXIS)
    second = run_ranks(8, _train_with, replace(config, layout=EVERY_AXIS), {})
    for one, other in zip(first, second, strict=True):
        assert [result.loss for result in one.results] == [result.loss for result in other.results]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(one.gradients, other.gradients, strict=True))
