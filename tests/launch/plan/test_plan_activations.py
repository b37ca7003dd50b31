"""The formulas of `switchyard plan` against the bytes that real ranks have alive at their fullest."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from launch.plan.activations import CHUNK, Microbatch, phases
from launch.plan.peaks import peak, stage_of
from moe.config import (
    BalanceConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
)
from moe.data.sources import DOCSTRINGS
from moe.model import transformer
from moe.model.stages import split
from moe.rules import validate
from moe.train.engine import Switchyard
from moe.train.runner import make_schedule
from moe.train.step import make_model
from parallel import activation, grouped, head
from parallel.groups import build_groups
from tests.alive import Alive
from tests.ranks import run_ranks

LENGTH = 128
DATA = DataConfig(sequence_length=LENGTH)
FULL, LORA = TuneConfig(), TuneConfig(method="lora", lora_rank=4)
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=4,
    intermediate_size=256,
    moe_intermediate_size=48,
    num_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
LITE = dict(vocab_size=512, num_shared_experts=2, top_k=6, score_function="softmax", normalize_top_k=False)


def run(
    layout: LayoutConfig,
    *,
    precision: str = "fp32",
    recompute: str = "none",
    data: DataConfig = DATA,
    tune: TuneConfig = FULL,
    **model: object,
) -> RunConfig:
    parts = layout.microbatches * (layout.dp or 1)
    return RunConfig(
        model=replace(MODEL, **model),  # type: ignore[arg-type]
        data=data,
        tune=tune,
        balance=BalanceConfig(bias="frozen" if tune.is_partial else "update"),
        layout=layout,
        train=TrainConfig(batch_size=2 * parts, precision=precision, recompute=recompute),  # type: ignore[arg-type]
    )


DENSE = dict(num_dense_layers=4, intermediate_size=96)
# Widths of latents, which this attention does not have, change nothing.
GROUPED = dict(attention="gqa", num_kv_heads=2, head_dim=24, kv_lora_rank=256, v_head_dim=64, **DENSE)
CHUNKED = dict(hidden_size=16, num_dense_layers=1)
PAIR = LayoutConfig(dp=2, ep=2, microbatches=2)
DUAL = LayoutConfig(pp=2, microbatches=4, schedule="dualpipe")
CASES = {
    "one rank": run(LayoutConfig(dp=1)),
    "bf16 recomputed": run(LayoutConfig(dp=1), precision="bf16", recompute="full", **LITE),
    "experts recomputed": run(
        LayoutConfig(dp=1), precision="bf16", recompute="full", **LITE | {"vocab_size": 64}
    ),
    "vocabulary": run(LayoutConfig(dp=1), precision="bf16", vocab_size=4096),
    "vocabulary in chunks": run(LayoutConfig(dp=1), num_layers=1, vocab_size=24576, **CHUNKED),
    "vocabulary in chunks bf16": run(
        LayoutConfig(dp=1), precision="bf16", num_layers=1, vocab_size=24576, num_mtp_layers=1, **CHUNKED
    ),
    "lora": run(LayoutConfig(dp=1), tune=LORA, **LITE),
    "ep lora": run(PAIR, tune=LORA, precision="bf16", **LITE),
    "ep lora recomputed": run(PAIR, tune=LORA, precision="bf16", recompute="full", **LITE),
    "mtp": run(LayoutConfig(dp=1), num_mtp_layers=1),
    "mtp recomputed": run(LayoutConfig(dp=1), num_mtp_layers=1, precision="bf16", recompute="full"),
    "query latent": run(LayoutConfig(dp=1), q_lora_rank=48, v_head_dim=24, num_dense_layers=4),
    "dense": run(LayoutConfig(dp=1), **DENSE),
    "documents": run(
        LayoutConfig(dp=1),
        data=replace(DATA, format="chat", packing="whole", paths=(DOCSTRINGS,)),
        num_dense_layers=4,
    ),
    "gqa": run(LayoutConfig(dp=1), **GROUPED),
    "gqa bf16 normed": run(LayoutConfig(dp=1), precision="bf16", qk_norm="head", **GROUPED),
    "gqa normed whole": run(LayoutConfig(dp=1), qk_norm="full", **GROUPED | {"num_kv_heads": 4}),
    "gqa tp": run(LayoutConfig(tp=2, dp=1), **GROUPED),
    "gqa cp": run(LayoutConfig(cp=2, dp=1), **GROUPED),
    "gqa cp own keys": run(LayoutConfig(cp=2, dp=1), **GROUPED | {"num_kv_heads": 4}),
    "ep": run(PAIR, **LITE),
    "ep bf16": run(PAIR, precision="bf16", **LITE),
    "ep bf16 recomputed": run(PAIR, precision="bf16", recompute="full", **LITE),
    "ep overlapped": run(replace(PAIR, microbatches=4, schedule="1f1b", overlap=True), **LITE),
    "tp": run(LayoutConfig(tp=2, dp=1), precision="bf16"),
    "tp etp": run(LayoutConfig(tp=2, dp=1, etp=2)),
    "cp": run(LayoutConfig(cp=2, dp=1)),
    "1f1b": run(LayoutConfig(pp=2, dp=1, microbatches=4)),
    "interleaved": run(LayoutConfig(pp=2, dp=1, microbatches=4, schedule="interleaved")),
    "zb-h1": run(LayoutConfig(pp=2, dp=1, microbatches=4, schedule="zb-h1"), precision="bf16"),
    "dualpipe": run(replace(DUAL, dp=1)),
    "dualpipe recomputed": run(replace(DUAL, dp=1), precision="bf16", recompute="full"),
}


def round_robin(experts: int, top_k: int, scores: torch.Tensor) -> torch.Tensor:
    """Every expert as often as any other."""
    tokens = scores.flatten(0, -2).shape[0]
    return (torch.arange(tokens * top_k) % experts).view(tokens, top_k)


def measure(rank: int, world_size: int) -> dict[str, int]:
    """By case, the most bytes alive beside what stays: of every case for so many ranks."""
    found = {}
    for name, config in CASES.items():
        layout = validate(config)
        if layout.world_size != world_size:
            continue
        groups = build_groups(layout)
        engine = Switchyard(make_model(config, groups), config, groups, torch.device("cpu"))
        for _, router in engine.model.routers():
            router.choose = lambda scores, m=config.model: round_robin(m.num_experts, m.top_k, scores)
        tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
        batch = transformer.Microbatch(
            tokens=tokens,
            labels=tokens,
            valid=torch.ones_like(tokens, dtype=torch.bool),
            documents=tokens if config.data.separate_documents else None,
            loss_weights=(1.0,) * (1 + config.model.num_mtp_layers),
        )
        # On CUDA a kernel makes the activation; tiles in fp32 as large as all rows are not to count here.
        small = patch.object(activation, "_TILE", 1024), patch.object(grouped, "_ROWS", 512)
        with Alive() as alive, small[0], small[1]:
            engine.train([batch] * config.layout.microbatches)
        found[name] = alive.peak
        engine.close()
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for world_size in (1, 2):
        results = run_ranks(world_size, measure)
        for name in results[0]:
            found[name] = [result[name] for result in results]
    return found


def reckoned(config: RunConfig, rank: int) -> int:
    layout, schedule = validate(config), make_schedule(config.layout, config.layout.microbatches)
    micro, recompute = Microbatch(config, layout, 1.0), config.train.recompute == "full"
    stages = {
        number: stage_of(phases(micro, part), recompute=recompute)
        for number, part in enumerate(split(config.model, schedule.num_stages, LENGTH))
    }
    return peak(schedule, layout.coordinates(rank)["pp"], stages).bytes + micro.boundaries


def test_chunks_of_the_vocabulary_are_those_of_the_head() -> None:
    assert CHUNK == head.CHUNK


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_the_measured_one(name: str, measured: dict[str, list[int]]) -> None:
    for rank, found in enumerate(measured[name]):
        assert reckoned(CASES[name], rank) == pytest.approx(found, rel=0.1), f"rank {rank}"


def test_what_separate_documents_take_is_the_measured_part(measured: dict[str, list[int]]) -> None:
    """The mask of a stage, and what each layer's attention makes of it."""
    found = measured["documents"][0] - measured["dense"][0]
    assert reckoned(CASES["documents"], 0) - reckoned(CASES["dense"], 0) == pytest.approx(found, rel=0.1)
