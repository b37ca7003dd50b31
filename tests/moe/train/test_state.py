"""A checkpoint of training holds everything, and any layout reads it bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.config import LayoutConfig, RunConfig
from moe.train import state
from moe.train.state import Position
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from tests.moe.train.test_step import steps
from tests.ranks import run_ranks
from tests.small import small_run


def everything(trainer) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    return {name: tensor.clone() for name, tensor in state._tensors(trainer)}


def save_on_ranks(rank: int, world_size: int, config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    trainer, _ = steps(config, world_size, rank, 2)
    state.save(trainer, folder, Position(2, 16, 500), keep=1)
    return everything(trainer)


def load_on_ranks(rank: int, world_size: int, config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    trainer, _ = steps(config, world_size, rank, 0)
    state.load(trainer, open_checkpoint(folder / "step-2"))
    return everything(trainer)


def merged(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


def test_load_restores_every_tensor(tmp_path: Path) -> None:
    """Weights, masters, moments, bias and counts, after training has moved them all."""
    config = small_run(tmp_path, num_mtp_layers=1)
    trainer, _ = steps(config, 1, 0, 2)
    state.save(trainer, tmp_path / "saved", Position(2, 16, 500), keep=1)
    saved = everything(trainer)
    assert all(tensor.any() for name, tensor in saved.items() if "exp_avg" not in name)
    random = open_checkpoint(tmp_path / "saved" / "step-2").read("random/torch")
    other, _ = steps(config, 1, 0, 0)
    assert state.load(other, open_checkpoint(tmp_path / "saved" / "step-2")) == Position(2, 16, 500)
    assert torch.equal(torch.get_rng_state(), random)
    restored = everything(other)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert {int(s["step"]) for s in other.optimizer._adam.state.values()} == {2}


def test_other_layouts_read_it(tmp_path: Path) -> None:
    """Written by four ranks with ep=4, read bit for bit by dp=2 ep=2 and by one rank."""
    config = small_run(tmp_path)
    four = replace(config, layout=LayoutConfig(dp=4, ep=4))
    written = merged(run_ranks(4, save_on_ranks, four, tmp_path / "saved"))
    two = replace(config, layout=LayoutConfig(dp=2, ep=2))
    one = replace(config, layout=LayoutConfig(dp=1, ep=1))
    for found in (
        merged(run_ranks(2, load_on_ranks, two, tmp_path / "saved")),
        load_on_ranks(0, 1, one, tmp_path / "saved"),
    ):
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], written[name]) for name in written)


def test_another_model_is_refused(tmp_path: Path) -> None:
    trainer, _ = steps(small_run(tmp_path), 1, 0, 0)
    state.save(trainer, tmp_path / "saved", Position(), keep=1)
    saved = open_checkpoint(tmp_path / "saved" / "step-0")
    wider, _ = steps(small_run(tmp_path, intermediate_size=48), 1, 0, 0)
    with pytest.raises(
        UserError, match=r"mlp.*gate_up.*must have the model's shape \[96, 32\], but has \[128, 32\]"
    ):
        state.load(wider, saved)
    deeper, _ = steps(small_run(tmp_path, num_layers=4), 1, 0, 0)
    with pytest.raises(UserError, match=r"has no tensor `model/layers\.3"):
        state.load(deeper, saved)
