"""Training chosen experts alone: the same under every layout, nothing else moved, nothing else paid for."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.config import LayoutConfig, RunConfig, TuneConfig
from moe.hf.inventory import model_pieces
from moe.model.stages import split
from moe.rules import validate
from moe.train import proof, state
from moe.train.state import Position
from moe.train.tuning import selection_of
from moe.train.world import groups_of
from parallel.checkpoint import open_checkpoint
from tests.moe.train.test_proof import loader_of
from tests.moe.train.test_state import save
from tests.moe.train.test_step import steps, steps_from
from tests.ranks import run_ranks
from tests.small import small_run

CPU = torch.device("cpu")
UNEVEN: Mapping[str, list[int]] = {"1": [6], "2": [5, 0, 3]}
LATE: Mapping[str, list[int]] = {"2": [1, 2, 7]}  # the first of two stages trains nothing


def tuned(folder: Path, experts: Mapping[str, list[int]], **flags: bool) -> RunConfig:
    """Settings of a run that trains these experts alone."""
    file = folder / f"selection-{len(list(folder.glob('selection-*')))}.json"
    file.write_text(json.dumps({"experts": experts, **flags}))
    config = small_run(folder)
    return replace(
        config,
        tune=TuneConfig(method="esft", selection=str(file)),
        balance=replace(config.balance, bias="frozen"),
        optim=replace(config.optim, weight_decay=0.1, lr=1e-2),
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, Path]]:
    """What one rank did with either selection."""
    folder = tmp_path_factory.mktemp("esft")
    found = {}
    for name, experts in (("uneven", UNEVEN), ("late", LATE)):
        config = tuned(folder, experts)
        proof.record(config, loader_of(config), 2, 4, folder / name, CPU)
        found[name] = config, folder / name
    return found


Cases = list[tuple[RunConfig, Path]]


def differences(rank: int, world_size: int, cases: Cases) -> list[list[str]]:
    """What differs from one rank in each case."""
    found = []
    for config, folder in cases:
        with groups_of(validate(config, world_size)) as groups:
            compared = list(proof.compare(config, groups, loader_of(config), 2, folder, CPU))
        found.append([failure for each in compared for failure in each.failures()])
    return found


LAYOUTS = (
    ("uneven", LayoutConfig(dp=4, ep=4, microbatches=1)),
    ("uneven", LayoutConfig(dp=4, ep=2, etp=2, microbatches=1)),
    ("late", LayoutConfig(pp=2, dp=2, ep=2, microbatches=2)),
    ("late", LayoutConfig(tp=2, pp=2, ep=2, microbatches=4, schedule="dualpipe")),
)


def test_layouts_train_like_one_rank(recorded: dict[str, tuple[RunConfig, Path]]) -> None:
    """Losses, norm and the chosen experts' gradients, where ranks of a layer and a stage train nothing."""
    assert split(recorded["late"][0].model, 2, 32)[0].layers == range(2)
    cases = []
    for name, layout in LAYOUTS:
        config, folder = recorded[name]
        cases.append((replace(config, layout=layout), folder))
    for found in run_ranks(4, differences, cases):
        for (config, _), failures in zip(cases, found, strict=True):
            assert not failures, (config.layout, failures)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [((), "fp32"), ((), "bf16"), (("shared_experts",), "fp32"), (("non_expert_modules",), "fp32")],
)
def test_only_what_is_selected_moves_and_is_paid_for(
    tmp_path: Path, flags: tuple[str, ...], precision: str
) -> None:
    """Every other tensor stays to the bit; moments are twice the selected elements, and nothing else."""
    config = tuned(tmp_path, UNEVEN, **dict.fromkeys(flags, True))
    config = replace(config, train=replace(config.train, precision=precision))
    selection = selection_of(config)
    assert selection is not None
    trainer, _ = steps(config, 1, 0, 0)
    before = {piece.name: piece.tensor.clone() for piece in model_pieces(trainer.model)}
    steps_from(trainer, 0, 2)
    moved = {p.name for p in model_pieces(trainer.model) if not torch.equal(p.tensor, before[p.name])}
    parameters = {name for name in before if not name.endswith("router.bias")}
    trained = {name for name in parameters if selection.trains(name)}
    assert moved == trained
    assert "layers.2.moe.experts.5.down.weight" in trained and "layers.2.moe.experts.4.down.weight" in before
    assert ("layers.1.moe.shared.down.weight" in trained) == ("shared_experts" in flags)
    assert ("layers.1.moe.router.projection.weight" in trained) == ("non_expert_modules" in flags)
    kept = [piece for piece in trainer.engine.owned() if not piece.name.startswith("model/")]
    kinds = 3 if precision == "bf16" else 2  # a master too
    assert sum(piece.tensor.numel() for piece in kept) == kinds * sum(before[n].numel() for n in trained)
    buffers = [p.main_grad for p in trainer.model.parameters() if hasattr(p, "main_grad")]
    assert sum(buffer.numel() for buffer in buffers) == sum(before[name].numel() for name in trained)


def saved_on_ranks(rank: int, world_size: int, config: RunConfig, folder: Path) -> list[float]:
    """A step, a checkpoint, a step."""
    trainer, first = steps(config, world_size, rank, 1)
    save(trainer, folder, Position(1, 8, 500))
    return [result.loss for result in first + steps_from(trainer, 1, 1)]


def test_a_checkpoint_holds_what_is_trained_and_any_layout_goes_on(tmp_path: Path) -> None:
    """Saved by two ranks, of which each holds chosen experts, and read by one, which holds them otherwise."""
    config = tuned(tmp_path, UNEVEN)
    spread = replace(config, layout=LayoutConfig(dp=2, ep=2, microbatches=1))
    losses, _ = run_ranks(2, saved_on_ranks, spread, tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved" / "step-1")
    held = {name.removeprefix("model/") for name in checkpoint.names if name.startswith("model/")}
    assert held == {
        f"layers.{layer}.moe.experts.{expert}.{part}.weight"
        for layer, chosen in UNEVEN.items()
        for expert in chosen
        for part in ("gate_up", "down")
    }
    alone, _ = steps(config, 1, 0, 0)
    assert state.load(alone, checkpoint) == Position(1, 8, 500)
    assert steps_from(alone, 1, 1)[0].loss == pytest.approx(losses[1], rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
