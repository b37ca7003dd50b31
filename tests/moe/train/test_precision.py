"""Which layers compute in FP8 and by whom; runs in FP8: layouts, resumes, and the guard."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import Fp8Config, LayoutConfig, RunConfig, TuneConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.model.transformer import Transformer
from moe.rules import validate
from moe.train import loop, precision
from moe.train.loop import train
from moe.train.step import Trainer, make_trainer, open_loader, read_batches
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from parallel.fp8 import Emulated, Products
from parallel.groups import build_groups, single
from parallel.linear import GroupedLinear, Linear
from tests.ranks import run_ranks
from tests.small import small_run

CPU = torch.device("cpu")
TIMED = ("tokens_per_second", "step_seconds", "memory_peak_bytes", "mfu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture
def config(place: Path) -> RunConfig:
    config = small_run(place, num_mtp_layers=1, num_layers=2)
    fp8 = Fp8Config(guard_every=2)
    return replace(config, train=replace(config.train, precision="fp8", fp8=fp8, steps=4))


def test_every_linear_layer_of_the_blocks_is_marked_and_no_other(config: RunConfig) -> None:
    tune = TuneConfig(method="lora", lora_targets=("attention", "experts", "head"))
    balance = replace(config.balance, bias="frozen")
    trainer = make_trainer(replace(config, tune=tune, balance=balance), single(), 3, CPU)
    named = dict(trainer.model.named_modules())
    layers = {name for name, each in named.items() if isinstance(each, (Linear, GroupedLinear))}
    high = {name for name in layers if "router" in name or "lora" in name}
    marked = {name for name in layers if named[name].fp8 is not None}
    assert marked == layers - high and len(high) > 4
    assert {"mtp.0.projection", "layers.0.mlp.down", "layers.1.moe.experts.gate_up"} <= marked
    assert {named[name].weight.dtype for name in marked} == {torch.bfloat16}


class Capable:
    """A GPU of some compute capability, as far as the choice of a backend looks."""

    type = "cuda"


@pytest.mark.parametrize(("capability", "who"), [((8, 0), None), ((8, 9), None), ((9, 0), "te")])
def test_the_backend_is_what_the_gpu_can_do(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], who: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision.transformer_engine, "backend", lambda: "te")
    device: Any = Capable()
    assert precision.backend_of(device) == who
    assert precision.backend_of(CPU) == Emulated()


def test_a_gpu_without_fp8_computes_in_bf16_and_says_so(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    device: Any = Capable()
    model = Transformer(config.model)
    with caplog.at_level(logging.WARNING):
        assert not precision.take_up(model, config.train, device)
    (told,) = caplog.messages
    assert "(compute capability 8.0) has no units for FP8 in blocks" in told and "in bf16" in told
    assert not any(layer.fp8 for layer in precision.fp8_layers(model))
    caplog.clear()
    assert precision.take_up(model, config.train, CPU) and "compute in FP8, emulated" in caplog.text
    assert not precision.take_up(Transformer(config.model), replace(config.train, precision="bf16"), CPU)


def trainer_of(config: RunConfig, world_size: int) -> tuple[Trainer, Loader]:
    corpus = prepare(config.data, config.model.vocab_size)
    groups = build_groups(validate(config, world_size)) if world_size > 1 else single()
    trainer = make_trainer(config, groups, len(corpus.domains), CPU)
    return trainer, open_loader(corpus.train, config)


def stepped(config: RunConfig, world_size: int) -> tuple[Trainer, list[float], dict[str, float]]:
    """Train two steps: losses and norms, and what the guard found."""
    trainer, loader = trainer_of(config, world_size)
    numbers: list[float] = []
    for step in range(2):
        batches = read_batches(loader, config, trainer.groups, step * config.train.batch_size)
        result = trainer.step(step, batches)
        numbers += result.loss, result.grad_norm
    list(trainer.engine.owned())
    return trainer, numbers, result.fp8_errors


def numbers_of(rank: int, world_size: int, config: RunConfig) -> tuple[list[float], dict[str, float]]:
    return stepped(config, world_size)[1:]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        (LayoutConfig(tp=2, ep=2, microbatches=2), 2),
        (LayoutConfig(pp=2, ep=2, dp=2, microbatches=4, schedule="dualpipe"), 4),
    ],
)
def test_layouts_train_alike_in_fp8_and_tell_the_same_guard(
    config: RunConfig, layout: LayoutConfig, world_size: int
) -> None:
    """To what bf16 and other blocks of cut weights leave: 1 % of losses, and every rank knows every layer."""
    config = replace(config, train=replace(config.train, batch_size=16))
    _, alone, errors = stepped(replace(config, layout=replace(LayoutConfig(), microbatches=2)), 1)
    assert list(errors) == ["0", "1", "mtp0"]
    assert all(0.01 < error < 0.06 for error in errors.values()), errors
    found = run_ranks(world_size, numbers_of, replace(config, layout=layout))
    for numbers, told in found:
        assert numbers == pytest.approx(alone, rel=1e-2)
        assert told == found[0][1]
        assert told == pytest.approx(errors, rel=0.4)


def test_rows_travel_in_fp8_to_the_same_losses(config: RunConfig) -> None:
    """The experts' products would have rounded them alike; the weight gradients do not, and are near."""
    config = replace(config, layout=LayoutConfig(dp=2, ep=2))
    packed = replace(config, train=replace(config.train, fp8=Fp8Config(guard_every=2, dispatch=True)))
    (plain, _), _ = run_ranks(2, numbers_of, config)
    (numbers, _), _ = run_ranks(2, numbers_of, packed)
    assert numbers != plain and numbers == pytest.approx(plain, rel=1e-2)


def test_fp8_is_not_bf16_and_the_guard_changes_no_bit(config: RunConfig) -> None:
    guarded, numbers, errors = stepped(config, 1)
    assert errors and all(
        isinstance(layer.fp8, Products) for layer in precision.fp8_layers(guarded.model)
    )  # put back
    silent = replace(config, train=replace(config.train, fp8=Fp8Config(guard_every=0)))
    assert stepped(silent, 1)[1:] == (numbers, {})
    plain = stepped(replace(config, train=replace(config.train, precision="bf16")), 1)
    assert plain[1] != numbers and plain[1] == pytest.approx(numbers, rel=1e-2) and plain[2] == {}


@dataclass(frozen=True)
class Wrong(Emulated):
    factor: float

    def product(self, rows: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        return super().product(rows, counts, weights) * self.factor


@pytest.mark.parametrize(("factor", "least", "most"), [(1.5, 0.4, 0.6), (torch.nan, torch.inf, torch.inf)])
def test_a_product_that_goes_wrong_is_told_of_its_layer_alone(
    config: RunConfig, factor: float, least: float, most: float
) -> None:
    """Errors do not travel: layers behind it see bf16's outputs."""
    trainer, loader = trainer_of(config, 1)
    trainer.model.layers["1"].attention.out.fp8 = Products(Wrong(factor))
    errors = trainer.step(1, read_batches(loader, config, single(), 0)).fp8_errors
    assert least <= errors.pop("1") <= most
    assert all(error < 0.06 for error in errors.values())


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / name).read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMED} for row in lines]


def test_a_killed_run_goes_on_bit_for_bit_and_guards_as_before(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "write_report", lambda run: None)  # its pictures take long
    config = replace(config, train=replace(config.train, eval_every=0))
    alarms = replace(config.telemetry.alarms, fp8_error=0.001)
    config = replace(config, telemetry=replace(config.telemetry, alarms=alarms))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    assert train(config, whole) == 0
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "step-4")  # after which it was killed, before the next save
    assert train(config, killed) == 0
    for name in ("metrics.jsonl", "fp8.jsonl", "alarms.jsonl"):
        assert rows(killed, name) == rows(whole, name)
    assert [(row["step"], row["layer"]) for row in rows(whole, "fp8.jsonl")] == [
        (step, layer) for step in (2, 4) for layer in (0, 1, "mtp0")
    ]
    told = {row["step"]: row["fp8_error"] for row in rows(whole, "metrics.jsonl") if "fp8_error" in row}
    assert told == {
        step: max(row["error"] for row in rows(whole, "fp8.jsonl") if row["step"] == step) for step in (2, 4)
    }
    (alarm,) = rows(whole, "alarms.jsonl")  # told once
    assert (alarm["step"], alarm["kind"]) == (2, "fp8_error")
    assert "off bf16's on the same inputs (`telemetry.alarms.fp8_error=0.001`)" in alarm["message"]
    one, two = (open_checkpoint(run / "checkpoints" / "step-4") for run in (whole, killed))
    assert one.digest == two.digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: replace(c, optim=replace(c.optim, engine="deepspeed")),
            "`train.precision` must be fp32 or ",
        ),
        (
            lambda c: replace(c, train=replace(c.train, precision="bf16", fp8=Fp8Config(dispatch=True))),
            "`train.fp8.dispatch` must be false with `train.precision=bf16`",
        ),
        (
            lambda c: replace(c, train=replace(c.train, fp8=Fp8Config(guard_every=-1))),
            "`train.fp8.guard_every` must not be negative",
        ),
    ],
)
def test_rules(config: RunConfig, change: Callable[[RunConfig], RunConfig], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        validate(change(config))
