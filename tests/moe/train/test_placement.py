"""Experts live anywhere: any permutation of a layer's experts over ranks trains as their order does."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from moe.config import LayoutConfig, RunConfig
from moe.model.experts import Placement
from moe.model.transformer import expert_layers
from moe.rules import validate
from moe.train import proof, state, tuning
from moe.train.state import Position
from moe.train.world import groups_of
from parallel.checkpoint import open_checkpoint
from parallel.groups import single
from tests.moe.train.test_proof import loader_of
from tests.moe.train.test_state import save
from tests.moe.train.test_step import steps, steps_from
from tests.ranks import run_ranks
from tests.small import small_run

CPU = torch.device("cpu")


@contextmanager
def shuffled(config: RunConfig, seed: int) -> Iterator[None]:
    """Every layer's experts in an order of its own."""
    stream = random.Random(seed)
    experts = range(config.model.num_experts)
    placements = {
        layer: Placement(tuple(stream.sample(experts, len(experts)))) for layer in expert_layers(config.model)
    }
    with patch.object(tuning, "placements", lambda config, ep: placements):
        yield


def test_seats_are_the_other_way_round() -> None:
    placement = Placement((2, 0, 3, 1), frozenset((1, 2)))
    assert placement.seats == (1, 3, 0, 2)
    assert placement.held(2, 1) == ((3, 1), 1)
    with pytest.raises(AssertionError, match="last seats"):
        placement.held(2, 0)
    with pytest.raises(AssertionError, match="no permutation"):
        _ = Placement((0, 0)).seats


def on_ranks(rank: int, world_size: int, config: RunConfig, recorded: Path, saved: Path) -> list[str]:
    """What differs from one rank whose experts are in order; leaves a checkpoint after a step."""
    with shuffled(config, 1):
        with groups_of(validate(config, world_size)) as groups:
            compared = list(proof.compare(config, groups, loader_of(config), 2, recorded, CPU))
        trainer, _ = steps(config, world_size, rank, 1)
        save(trainer, saved, Position(1, 8, 500))
    return [failure for each in compared for failure in each.failures()]


def test_any_placement_trains_alike(tmp_path: Path) -> None:
    """Losses, gradients, counts and bias, on one rank and on two; and checkpoints know no placement."""
    config = small_run(tmp_path, num_mtp_layers=1, capacity_factor=1.5)
    config = replace(config, layout=LayoutConfig(microbatches=2))
    proof.record(config, loader_of(config), 2, 2, tmp_path / "alone", CPU)
    with shuffled(config, 2):
        for difference in proof.compare(config, single(), loader_of(config), 2, tmp_path / "alone", CPU):
            assert difference.passed, list(difference.failures())
    with shuffled(config, 2):
        _, (moved,) = steps(config, 1, 0, 1)
    _, (in_order,) = steps(config, 1, 0, 1)
    for name, layer in in_order.layers.items():
        assert (
            torch.equal(moved.layers[name].rank_rows, layer.rank_rows)
            and layer.rank_rows.sum() < layer.counts.sum()
        )
        torch.testing.assert_close(moved.layers[name].gates, layer.gates, rtol=1e-5, atol=0)
    spread = replace(config, layout=LayoutConfig(dp=2, ep=2, microbatches=1))
    for failures in run_ranks(2, on_ranks, spread, tmp_path / "alone", tmp_path / "saved"):
        assert not failures
    saved = open_checkpoint(tmp_path / "saved" / "step-1")
    with shuffled(config, 3):
        trainer, _ = steps(config, 1, 0, 0)
    state.load(trainer, saved)
    plain, _ = steps(config, 1, 0, 0)
    state.load(plain, saved)
    for piece in trainer.engine.owned():
        assert torch.equal(piece.tensor, saved.read(piece.name)), piece.name
    first, second = (steps_from(each, 1, 1)[0] for each in (trainer, plain))
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
