"""DeepSeek-V2-Lite as it was released: 15.7 B parameters on 8 ranks, and a layer of full width trained."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe.config import (
    BalanceConfig,
    DataConfig,
    LayoutConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
)
from moe.data.loader import Batch
from moe.hf.inventory import complete
from moe.model.transformer import Transformer
from moe.rules import validate
from moe.train import tuning
from moe.train.counting import Sampling
from moe.train.step import Trainer, build_model
from moe.train.units import replicas
from parallel.collectives import group_size
from parallel.groups import Groups, imagine, single
from parallel.shards import parameter_pieces, pieces
from tests.released import V2_LITE

WORLD = 8
TOTAL, ROUTED = 15_706_484_224, 14_394_851_328
LITE = RunConfig(
    model=V2_LITE,
    layout=LayoutConfig(dp=8, ep=8),
    train=TrainConfig(batch_size=8, precision="bf16"),
    balance=BalanceConfig(bias="none"),
)
ATTENTION = {
    "attention_norm.weight": (2048,),
    "attention.query.weight": (3072, 2048),  # 16 heads of 128 + 64
    "attention.kv_down.weight": (576, 2048),  # 512 + 64
    "attention.kv_norm.weight": (512,),
    "attention.kv_up.weight": (4096, 512),  # 16 heads of 128 + 128
    "attention.out.weight": (2048, 2048),
    "mlp_norm.weight": (2048,),
}
DENSE = {"mlp.gate_up.weight": (2 * 10944, 2048), "mlp.down.weight": (2048, 10944)}
SPARSE = {
    "moe.router.projection.weight": (64, 2048),
    "moe.experts.gate_up.weight": (8, 2 * 1408, 2048),  # of 64 experts, 8 on a rank
    "moe.experts.down.weight": (8, 2048, 1408),
    "moe.shared.gate_up.weight": (2 * 2816, 2048),
    "moe.shared.down.weight": (2048, 2816),
}


def ranks(layout: LayoutConfig) -> Iterator[tuple[Groups, Transformer]]:
    """What each rank of a layout holds of the whole model, without its values."""
    config = replace(LITE, layout=layout, train=replace(LITE.train, batch_size=8 * layout.microbatches))
    for rank in range(WORLD):
        groups = imagine(validate(config, WORLD), rank)
        with torch.device("meta"):
            yield groups, build_model(config, groups, seed=None)


def test_every_rank_of_eight_holds_its_share() -> None:
    expected = {"embedding.weight": (102400, 2048), "norm.weight": (2048,), "head": (102400, 2048)}
    for layer in range(27):
        shapes = ATTENTION | (SPARSE if layer else DENSE)
        expected |= {f"layers.{layer}.{name}": shape for name, shape in shapes.items()}
    canonical = {name: tuple(shape) for name, shape in complete(V2_LITE).items()}
    times: Counter[str] = Counter()
    for groups, model in ranks(LayoutConfig(dp=8, ep=8)):
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        held = {piece.name: tuple(piece.tensor.shape) for piece in parameter_pieces(model)}
        assert all(canonical[name] == shape for name, shape in held.items())
        numbers = {int(found[1]) for name in held if (found := re.search(r"experts\.(\d+)\.", name))}
        assert numbers == set(range(8 * groups.rank, 8 * groups.rank + 8))
        times.update(held.keys())
    assert times == {name: 1 if ".experts." in name else WORLD for name in canonical}
    sizes = {name: math.prod(shape) for name, shape in canonical.items()}
    assert sum(sizes.values()) == TOTAL
    assert sum(size for name, size in sizes.items() if ".experts." in name) == ROUTED
    assert (round(ROUTED / 1e9, 3), round((TOTAL - ROUTED) / 1e9, 3)) == (14.395, 1.312)


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(tp=2, pp=2, ep=4),
        LayoutConfig(tp=2, ep=2, etp=2),
        LayoutConfig(pp=4, ep=2, microbatches=8, schedule="dualpipe"),
    ],
    ids=str,
)
def test_other_layouts_hold_each_element_as_often_as_it_has_copies(layout: LayoutConfig) -> None:
    elements: Counter[str] = Counter()  # in eighths
    for groups, model in ranks(layout):
        for name, parameter in model.named_parameters():
            share = WORLD // group_size(replicas(parameter, groups))
            for piece in pieces(name, parameter, parameter.detach().view(-1)):
                elements[piece.name] += share * piece.tensor.numel()
    assert elements == {name: WORLD * math.prod(shape) for name, shape in complete(V2_LITE).items()}


ALPHABET = 8  # few tokens choose few experts: some must go without
CHOSEN = set(range(0, 64, 8))
NOISE = 1_000_003  # a prime, so that no two experts are alike


def layer_of(tune: TuneConfig) -> RunConfig:
    """One layer of experts, as wide as released."""
    return RunConfig(
        model=replace(V2_LITE, num_layers=1, num_dense_layers=0, vocab_size=256),
        data=DataConfig(sequence_length=64),
        train=TrainConfig(steps=3, batch_size=2, precision="bf16"),
        optim=OptimConfig(lr=5e-5, warmup_steps=0, weight_decay=0.0, moments="bf16"),
        balance=BalanceConfig(bias="none"),
        tune=tune,
    )


@torch.no_grad()
def fill(model: Transformer) -> None:
    """Noise of the usual scale, repeated: drawing half a billion numbers would take longest of all."""
    noise = 0.02 * torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    for index, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        shifted = noise.roll(index).to(parameter.dtype)
        for part in parameter.view(-1).split(NOISE):
            part.copy_(shifted[: len(part)])


def a_batch() -> Batch:
    row = torch.randint(ALPHABET, (2, 65), generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(2, 64, dtype=torch.int64)
    return Batch(
        tokens=row[:, :-1],
        labels=row[:, 1:],
        valid=torch.ones(2, 64, dtype=torch.bool),
        documents=zeros.int(),
        domains=zeros,
    )


def by_expert(named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[int, str, Tensor]]:
    for name, tensor in named:
        if found := re.search(r"\.experts\.(\d+)\.", name):
            yield int(found[1]), name, tensor


def masters(trainer: Trainer) -> dict[tuple[int, str], Tensor]:
    """The first rows of every expert that is trained, in fp32."""
    owned = ((p.name, p.tensor) for p in trainer.engine.owned() if p.name.startswith("master/"))
    found = {(expert, name): tensor[:16].clone() for expert, name, tensor in by_expert(owned)}
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    return found


def experts_with_gradient(trainer: Trainer) -> set[int]:
    named = (
        (piece.name, piece.tensor)
        for segment in trainer.engine.zero.segments()  # type: ignore[attr-defined]
        for piece in pieces(segment.name, segment.parameter, segment.grad, segment.begin)
    )
    return {expert for expert, _, gradient in by_expert(named) if gradient.any()}


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


GIBIBYTES = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.skipif(GIBIBYTES < 6, reason=f"needs 6 GiB of memory, and {GIBIBYTES:.1f} are free")
@pytest.mark.usefixtures("two_threads")
def test_a_layer_of_full_width_trains(tmp_path: Path) -> None:
    """All but 56 of its experts: masters, moments and gradients of all would take 8 GB and half a minute."""
    selection = tmp_path / "selection.json"
    flags = {"shared_experts": True, "non_expert_modules": True}
    selection.write_text(json.dumps({"experts": {"0": sorted(CHOSEN)}, **flags}))
    config = layer_of(TuneConfig(method="esft", selection=str(selection)))
    validate(config, 1)
    model = build_model(config, single(), seed=None)
    fill(model)
    tuning.prepare(model, config)
    trainer = Trainer(model, config, single(), num_domains=1)
    before, losses, busy = masters(trainer), [], set[int]()
    assert {expert for expert, _ in before} == CHOSEN
    for step in range(config.train.steps):
        result = trainer.step(step, [a_batch()], Sampling(domains=True))
        layer = result.layers["0"]
        assert int(layer.counts.sum()) == int(layer.rank_rows.sum()) == 2 * 64 * 6
        assert layer.domains is not None and torch.equal(layer.domains[0], layer.counts)
        chosen = set(layer.counts.nonzero().flatten().tolist())
        assert experts_with_gradient(trainer) == chosen & CHOSEN
        losses.append(result.loss)
        busy |= chosen
    after = masters(trainer)
    moved = {expert for expert, name in before if not torch.equal(before[expert, name], after[expert, name])}
    assert moved == busy & CHOSEN and 0 < len(moved) < len(CHOSEN)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1, losses
