"""`bench model` on a small model: the losses of transformers, sound rows, and what is lost by arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.bench import costs, model
from launch.bench.trainers import Ours, kept_bytes, transformers_of
from launch.compose import from_recipe
from moe.config import BalanceConfig, LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.model.router import Router
from moe.rules import validate
from moe.train.step import open_loader, read_batches
from parallel.groups import single
from tests.released import V2_LITE
from tests.small import small_run

CPU = torch.device("cpu")
V2 = {"score_function": "softmax", "group_score": "max", "normalize_top_k": False, "num_shared_experts": 2}


def v2_run(folder: Path, precision: str) -> RunConfig:
    config = small_run(folder, **V2)
    train = replace(config.train, precision=precision)
    return replace(config, balance=BalanceConfig(bias="none"), layout=LayoutConfig(), train=train)


def test_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = model.measure(v2_run(tmp_path, "fp32"), 1, CPU)
    ours, grouped, eager = result["rows"]
    assert [row["name"] for row in (grouped, eager)] == ["transformers grouped_mm", "transformers eager"]
    for row in (grouped, eager):
        assert row["losses"] == pytest.approx(ours["losses"], rel=2e-6)
    assert result["losses_agree"] and ours["losses"][0] > ours["losses"][1]  # and it learns
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])
        work = row["tokens_per_second"] * result["flops_per_token"]
        assert row["mfu"] == pytest.approx(work / result["measured_peak_flops"])
        assert row["memory_peak_bytes"] > 16 * result["parameters"]  # weights, gradients and two moments
    model.show(result)
    assert "losses agree" in capsys.readouterr().out


def test_bf16_differs_by_its_masters_alone(tmp_path: Path) -> None:
    config = v2_run(tmp_path, "bf16")
    corpus = prepare(config.data, config.model.vocab_size, print)
    loader, ours = open_loader(corpus.train, config), Ours(config, len(corpus.domains), CPU)
    (grouped,) = transformers_of(ours, ["grouped_mm"], CPU)
    for step in range(3):
        (batch,) = read_batches(loader, config, single(), step * 8)
        assert grouped.step(step, batch) == pytest.approx(ours.step(step, batch), rel=1e-3)
    count = sum(parameter.numel() for parameter in ours.trainer.model.parameters())
    assert kept_bytes(ours) == pytest.approx(count * (2 + 4 + 4 + 8), rel=0.01)  # gradients, masters, moments
    assert kept_bytes(grouped) == pytest.approx(count * (2 + 4), rel=0.01)


def test_losses_that_differ_are_seen() -> None:
    assert model.agree({"a": [2.0, 1.0], "b": [2.001, 1.0]}, 1e-3)
    assert not model.agree({"a": [2.0, 1.0], "b": [2.0, 1.01]}, 1e-3)


def test_what_is_lost_counts_as_often_as_it_happens() -> None:
    found = {"as routed": 2.0, "telemetry": 2.1, "telemetry with samples": 3.1, "checkpoint": 7.0}
    rows = costs.rows_of(found | {"balanced": 1.6, "zipf": 2.5}, 100, save_every=50, sample_every=10)
    assert {row["cause"]: row["step_seconds"] for row in rows} == pytest.approx(
        {"none": 2.0, "telemetry": 2.2, "checkpoint": 2.1, "routing balanced": 1.6, "routing zipf": 2.5}
    )
    assert rows[1]["lost_tokens_per_second"] == pytest.approx(50 - 100 / 2.2)
    assert rows[3]["lost_share"] == pytest.approx(-0.25)


def test_routing_is_forced_and_given_back(tmp_path: Path) -> None:
    config = v2_run(tmp_path, "fp32")
    corpus = prepare(config.data, config.model.vocab_size, print)
    ours, choose = Ours(config, len(corpus.domains), CPU), Router.choose
    (batch,) = read_batches(open_loader(corpus.train, config), config, single(), 0)
    loads = {}
    for kind in ("balanced", "zipf", costs.PLAIN):
        with costs._routing(kind, ours, batch):
            layers = ours.trainer.step(0, [batch]).layers
        loads[kind] = [layer.counts.tolist() for layer in layers.values()]
    assert loads["balanced"] == [[64] * 8] * 2  # 256 tokens, 2 of 8 experts
    assert all(max(counts) > 120 and min(counts) < 40 for counts in loads["zipf"])
    assert Router.choose is choose and loads[costs.PLAIN] not in (loads["balanced"], loads["zipf"])


def test_the_recipe_has_the_released_ratios() -> None:
    config = from_recipe("tiny_wide")
    validate(config)
    ours, released = config.model, V2_LITE
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_heads", "kv_lora_rank"):
        assert 4 * getattr(ours, name) == getattr(released, name), name
    for name in ("num_experts", "top_k", "num_shared_experts", "score_function", "group_score", "v_head_dim"):
        assert getattr(ours, name) == getattr(released, name), name
    assert not ours.normalize_top_k and config.balance.bias == "none" and config.layout.ep == 1
