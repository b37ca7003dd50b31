"""Clipping: the whole gradient by one norm, or each component by its own, the same under every layout."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from moe.components import component_of
from moe.config import LayoutConfig, RunConfig
from moe.train.engine import KINDS, Switchyard
from tests.moe.train.test_step import steps
from tests.ranks import run_ranks
from tests.small import small_run

LIMIT = 0.05


def clipped(rank: int, world_size: int, config: RunConfig) -> tuple[float, dict[str, float]]:
    """The norm that a step reports, and the norms by component of the gradient that it moved by."""
    trainer, (result,) = steps(config, world_size, rank, 1)
    assert isinstance(trainer.engine, Switchyard)
    norms = trainer.engine.zero.norms(KINDS, component_of)
    return result.grad_norm, {kind: norm for kind, norm in norms.items() if norm}


@pytest.mark.parametrize("clip", ["model", "component"])
def test_clipping(tmp_path: Path, clip: Literal["model", "component"]) -> None:
    config = small_run(tmp_path, num_mtp_layers=1)
    whole, free = clipped(0, 1, replace(config, optim=replace(config.optim, clip_norm=0.0)))
    assert len(free) == 9 and math.hypot(*free.values()) == pytest.approx(whole)
    config = replace(config, optim=replace(config.optim, clip=clip, clip_norm=LIMIT))
    spread = replace(config, layout=LayoutConfig(dp=2, ep=2))
    expected = {kind: norm * LIMIT / whole for kind, norm in free.items()}
    if clip == "component":
        assert min(free.values()) < LIMIT < max(free.values())  # some are left alone
        expected = {kind: min(LIMIT, norm) for kind, norm in free.items()}
    for reported, norms in [clipped(0, 1, config), *run_ranks(2, clipped, spread)]:
        assert reported == pytest.approx(whole, rel=1e-5)  # what the gradient was before
        assert norms == pytest.approx(expected, rel=1e-5)
