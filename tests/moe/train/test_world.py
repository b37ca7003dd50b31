"""Ranks that take one layout after the other."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe.train.world import groups_of, world
from parallel.collectives import all_reduce
from parallel.layout import Layout
from tests.moe.train.test_step import steps
from tests.ranks import run_ranks
from tests.small import small_run


def in_turn(rank: int, world_size: int) -> list[int]:
    """How many groups there are after each layout, and the sum over one of its groups."""
    found = []
    for layout in (Layout(dp=2, ep=2), Layout(tp=2), Layout(cp=2, etp=2)):
        with groups_of(layout) as groups:
            found.append(int(all_reduce(torch.tensor(rank + 1), groups.world)))
        found.append(len(dist.distributed_c10d._world.pg_map))
    return found


def test_groups_of_a_layout_are_gone_after_it() -> None:
    assert run_ranks(2, in_turn) == [[3, 1] * 3] * 2


def test_one_rank_needs_no_process_group(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world() as device, groups_of(Layout()) as groups:
        assert not dist.is_initialized()
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert groups.world is None


def test_deterministic_kernels_for_as_long_as_asked(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_imports_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's, and sympy for it, take longer to import than all that a rank needs."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in (
        "torch._dynamo",
        "torch._inductor",
        "torch._inductor.config",
        "sympy",
        "torch.fx.experimental.symbolic_shapes",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    with world():
        steps(small_run(tmp_path), 1, 0, 1)
