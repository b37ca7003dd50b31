"""A checkpoint of training holds everything, and any layout reads it bit for bit and trains on alike."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moe.config import LayoutConfig, RunConfig
from moe.train import state
from moe.train.state import Position
from moe.train.step import Trainer
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from parallel.saving import Saver
from tests.moe.train.test_step import steps, steps_from
from tests.ranks import run_ranks
from tests.reduced import ranks_of
from tests.small import small_run

TP_PP_EP = LayoutConfig(tp=2, pp=2, ep=2, microbatches=2)
LAYOUTS = {
    "tp2·pp2·ep2": TP_PP_EP,
    "ep4": LayoutConfig(dp=4, ep=4),
    "pp2·dp2": LayoutConfig(pp=2, dp=2, microbatches=2),
    "cp2·etp2": LayoutConfig(cp=2, etp=2, microbatches=2),
    "pp2·dp2, both ways": LayoutConfig(pp=2, dp=2, ep=2, microbatches=4, schedule="dualpipe"),
    "one rank": LayoutConfig(microbatches=2),
}


def save(trainer: Trainer, folder: Path, position: Position) -> None:
    saver = Saver(folder, trainer.groups.world, keep_last=9)
    saver.save(position.step, state.owned(trainer), asdict(position))
    saver.wait()


def train_on_ranks(rank: int, world_size: int, config: RunConfig, folder: Path, begin: int) -> list[float]:
    """From the checkpoint at `begin`, if it is not 0: two steps, a checkpoint, two more; the losses."""
    trainer, _ = steps(config, world_size, rank, 0)
    if begin:
        position = state.load(trainer, open_checkpoint(folder / f"step-{begin}"))
        assert position == Position(begin, 8 * begin, 500)
    first = steps_from(trainer, begin, 2)
    save(trainer, folder, Position(begin + 2, 8 * (begin + 2), 500))
    return [result.loss for result in first + steps_from(trainer, begin + 2, 2)]


def on_layout(name: str, config: RunConfig, folder: Path, begin: int) -> list[float]:
    config = replace(config, layout=LAYOUTS[name])
    world_size = ranks_of(config.layout)
    if world_size == 1:
        return train_on_ranks(0, 1, config, folder, begin)
    losses = run_ranks(world_size, train_on_ranks, config, folder, begin)
    assert all(each == losses[0] for each in losses)
    return losses[0]


def rewrite_on_ranks(rank: int, world_size: int, config: RunConfig, source: Path, target: Path) -> None:
    trainer, _ = steps(config, world_size, rank, 0)
    position = state.load(trainer, open_checkpoint(source))
    save(trainer, target, position)


def rewrite(name: str, config: RunConfig, source: Path, target: Path) -> None:
    """Read a checkpoint under a layout and write it again."""
    config = replace(config, layout=LAYOUTS[name])
    world_size = ranks_of(config.layout)
    if world_size == 1:
        rewrite_on_ranks(0, 1, config, source, target)
    else:
        run_ranks(world_size, rewrite_on_ranks, config, source, target)


def test_a_checkpoint_goes_through_every_layout_and_back_bit_for_bit(tmp_path: Path) -> None:
    """Written under tp2·pp2·ep2: weights, moments, biases, counts and random state survive each rewriting."""
    config = small_run(tmp_path, num_mtp_layers=1)
    on_layout("tp2·pp2·ep2", config, tmp_path / "0", 0)
    original = open_checkpoint(tmp_path / "0" / "step-2")
    assert {name.split("/")[0] for name in original.names} == {
        *("model", "exp_avg", "exp_avg_sq", "router", "random")
    }
    assert "model/layers.2.moe.experts.7.gate_up.weight" in original.names
    order = ["ep4", "pp2·dp2", "pp2·dp2, both ways", "cp2·etp2", "one rank", "tp2·pp2·ep2"]
    for number, name in enumerate(order):
        rewrite(name, config, tmp_path / str(number) / "step-2", tmp_path / str(number + 1))
        copy = open_checkpoint(tmp_path / str(number + 1) / "step-2")
        assert set(copy.names) == set(original.names), name
        unequal = [each for each in original.names if not torch.equal(copy.read(each), original.read(each))]
        assert not unequal, name
        assert copy.state == original.state


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2·pp2·ep2", "ep4"),
        ("tp2·pp2·ep2", "pp2·dp2"),
        ("tp2·pp2·ep2", "one rank"),
        ("tp2·pp2·ep2", "pp2·dp2, both ways"),
        ("pp2·dp2, both ways", "one rank"),
        ("one rank", "tp2·pp2·ep2"),
        ("ep4", "cp2·etp2"),
    ],
)
def test_another_layout_goes_on_as_if_nothing_had_happened(tmp_path: Path, before: str, after: str) -> None:
    """Losses of the resumed run within 1e-5 of the run that was never stopped."""
    config = small_run(tmp_path, num_mtp_layers=1)
    undisturbed = on_layout(before, config, tmp_path / "saved", 0)
    resumed = on_layout(after, config, tmp_path / "saved", 2)
    assert resumed[:2] == pytest.approx(undisturbed[2:], rel=1e-5)
    assert resumed[0] != resumed[1]


def test_load_restores_every_tensor(tmp_path: Path) -> None:
    """Weights, masters, moments, bias and counts, after training has moved them all."""
    config = small_run(tmp_path, num_mtp_layers=1)
    config = replace(config, train=replace(config.train, precision="bf16"))
    trainer, _ = steps(config, 1, 0, 2)
    save(trainer, tmp_path / "saved", Position(2, 16, 500))
    saved = {piece.name: piece.tensor.clone() for piece in state.owned(trainer)}
    assert {name.split("/")[0] for name in saved} >= {"model", "master", "exp_avg", "router"}
    random = open_checkpoint(tmp_path / "saved" / "step-2").read("random/torch")
    other, _ = steps(config, 1, 0, 0)
    torch.manual_seed(77)
    assert state.load(other, open_checkpoint(tmp_path / "saved" / "step-2")) == Position(2, 16, 500)
    assert torch.equal(torch.get_rng_state(), random)
    restored = {piece.name: piece.tensor for piece in state.owned(other)}
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert steps_from(other, 2, 1)[0].loss == steps_from(trainer, 2, 1)[0].loss


def test_another_model_is_refused(tmp_path: Path) -> None:
    trainer, _ = steps(small_run(tmp_path), 1, 0, 0)
    save(trainer, tmp_path / "saved", Position())
    saved = open_checkpoint(tmp_path / "saved" / "step-0")
    wider, _ = steps(small_run(tmp_path, intermediate_size=48), 1, 0, 0)
    with pytest.raises(
        UserError, match=r"mlp.*gate_up.*must have the model's shape \[96, 32\], but has \[128, 32\]"
    ):
        state.load(wider, saved)
    deeper, _ = steps(small_run(tmp_path, num_layers=4), 1, 0, 0)
    with pytest.raises(UserError, match=r"has no tensor `model/layers\.3"):
        state.load(deeper, saved)
