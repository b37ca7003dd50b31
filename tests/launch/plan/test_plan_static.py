"""What `switchyard plan` says a rank holds, against the tensors of real ranks, and against published sums."""

from dataclasses import replace

import pytest
import torch

from launch.plan.static import Static, static_bytes
from moe.config import (
    BalanceConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
)
from moe.rules import validate
from moe.train.engine import Switchyard
from moe.train.step import build_model, make_model
from moe.train.tuning import shape
from parallel.groups import Groups, build_groups, imagine
from parallel.layout import Layout
from tests.ranks import run_ranks
from tests.released import V2_LITE

MODEL = ModelConfig(vocab_size=328, hidden_size=36, num_layers=4, num_experts=8, num_mtp_layers=1)
LAYOUTS = {
    1: [LayoutConfig()],
    4: [
        LayoutConfig(dp=4, ep=2),
        LayoutConfig(tp=2, dp=2, etp=2, ep=2),
        LayoutConfig(cp=2, pp=2, dp=1, ep=2),
        LayoutConfig(pp=2, dp=2, schedule="dualpipe", microbatches=4),
    ],
    8: [LayoutConfig(pp=4, dp=2, ep=2, schedule="dualpipe", microbatches=8)],
}


def settings(layout: LayoutConfig, **optim: object) -> RunConfig:
    batch = 8 * layout.microbatches
    return RunConfig(
        model=MODEL,
        data=DataConfig(sequence_length=32),
        layout=layout,
        train=TrainConfig(batch_size=batch, precision="bf16" if optim else "fp32"),
        optim=OptimConfig(**optim),  # type: ignore[arg-type]
    )


def cases(world_size: int) -> list[RunConfig]:
    return [
        config
        for layout in LAYOUTS[world_size]
        for config in (settings(layout), settings(layout, moments="bf16", grad_reduce="bf16"))
    ]


def places(groups: Groups) -> dict[str, tuple[int, int] | None]:
    """Size and rank of every group."""
    held = {**vars(groups), **{f"copies.{name}": group for name, group in vars(groups.copies).items()}}
    kinds = (torch.distributed.ProcessGroup, type(None))
    return {
        name: (group.size(), group.rank()) if group else None
        for name, group in held.items()
        if isinstance(group, kinds)
    }


def hold(rank: int, world_size: int) -> list[tuple[list[int], bool]]:
    found = []
    for config in cases(world_size):
        layout = validate(config)
        groups = build_groups(layout)
        engine = Switchyard(make_model(config, groups), config, groups, torch.device("cpu"))
        buckets = list(engine.zero._buckets())
        weights = sum(bucket._weights.nbytes for bucket in buckets) + sum(
            each.nbytes for each in engine.model.buffers()
        )
        masters = [bucket._master for bucket in buckets if bucket._master is not bucket._weight]
        chunks = engine._optimizer._chunks
        moments = [kept for chunk in chunks for each in chunk.moments for kept in each.values()]
        counters = [state["step"] for chunk in chunks for state in chunk._adam.state.values()]
        optimizer = sum(each.nbytes for each in (*masters, *moments, *counters))
        real = [weights, sum(bucket._grads.nbytes for bucket in buckets), optimizer]
        alike = places(imagine(layout, rank)) == places(groups)
        found.append((real, alike))
        engine.close()
    return found


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_bytes_and_groups_are_those_of_real_ranks(world_size: int) -> None:
    for rank, results in enumerate(run_ranks(world_size, hold)):
        for config, (real, alike) in zip(cases(world_size), results, strict=True):
            said = static_bytes(config, validate(config), rank)
            assert [said.weights, said.gradients, said.optimizer] == real, (rank, config.layout)
            assert alike, (rank, config.layout)


def lite(ep: int, rank: int = 0) -> Static:
    """Full fine-tuning of DeepSeek-V2-Lite on eight ranks."""
    config = RunConfig(
        model=V2_LITE,
        layout=LayoutConfig(dp=8, ep=ep),
        train=TrainConfig(batch_size=8, precision="bf16"),
    )
    return static_bytes(config, Layout(dp=8, ep=ep), rank)


@pytest.mark.parametrize(("ep", "gigabytes"), [(1, 117.8), (2, 74.6), (4, 53.0), (8, 42.2)])
def test_v2_lite_on_eight_ranks(ep: int, gigabytes: float) -> None:
    ranks = [lite(ep, rank) for rank in range(8)]
    for held in ranks:
        assert (held.weights + held.gradients + held.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    masters_and_moments = sum(held.optimizer for held in ranks)
    assert masters_and_moments == pytest.approx(12 * 15_706_484_224, rel=1e-5)  # each parameter once


def test_frozen_parameters_are_weights_alone() -> None:
    config = settings(LayoutConfig())
    full = static_bytes(config, validate(config), 0)
    config = replace(config, tune=TuneConfig(frozen=("experts",)))
    part = static_bytes(config, validate(config), 0)
    experts = 4 * 3 * 8 * MODEL.hidden_size * MODEL.moe_intermediate_size * 4  # of 3 layers and a module
    assert full.weights - part.weights < 64 * 100
    assert full.gradients - part.gradients == pytest.approx(experts, rel=1e-3)
    assert full.optimizer - part.optimizer == pytest.approx(2 * experts, rel=1e-3)


def test_adapters_are_all_that_lora_pays_for() -> None:
    config = settings(LayoutConfig(dp=2, ep=2))
    config = replace(config, tune=TuneConfig(method="lora"), balance=BalanceConfig(bias="frozen"))
    with torch.device("meta"):
        model = build_model(config, imagine(validate(config), 0), seed=None)
        base = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        shape(model, config)
    added = sum(each.numel() for each in model.parameters() if each.requires_grad)
    found = static_bytes(config, validate(config), 0)
    assert found.gradients == pytest.approx(4 * added, rel=0.02)  # with the padding of each buffer
    assert found.weights == pytest.approx(base + 4 * added, rel=0.005)
