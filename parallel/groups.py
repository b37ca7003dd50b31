"""Process groups in Megatron's fashion, built once with its own grid and passed down as one value.

`HyperCommGrid` needs no globals. Its file is loaded by itself: importing the package around it
costs every rank four seconds and warns of accelerator libraries that nothing here uses.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from parallel.collectives import Group
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A rank's process groups; None where a group would hold this rank alone.

    `dp`: every rank with distinct sequences. `ep`: ranks that together hold all experts.
    `expert_dp`: ranks that hold the same experts.
    """

    layout: Layout
    rank: int
    dp: Group
    ep: Group
    expert_dp: Group


def single() -> Groups:
    """The groups of a run on one rank: none."""
    return Groups(layout=Layout(dp=1, ep=1), rank=0, dp=None, ep=None, expert_dp=None)


def build_groups(layout: Layout) -> Groups:
    """Build every group of a layout. Collective: every rank of the initialised world must call."""
    if layout.world_size == 1:
        return single()
    assert dist.get_world_size() == layout.world_size
    # The first dimension varies fastest: an expert-parallel group is a run of neighbouring ranks.
    grid = _grid_module().HyperCommGrid([layout.ep, layout.expert_dp], ["ep", "expert_dp"])
    made = {axis: grid.create_pg(axis) for axis in ("ep", "expert_dp")}
    made["dp"] = grid.create_pg(["ep", "expert_dp"])
    kept = {axis: group if dist.get_world_size(group) > 1 else None for axis, group in made.items()}
    return Groups(layout=layout, rank=dist.get_rank(), **kept)


def _grid_module() -> ModuleType:
    package = importlib.util.find_spec("megatron")
    assert package is not None and package.submodule_search_locations is not None
    (root,) = list(package.submodule_search_locations)[:1]
    spec = importlib.util.spec_from_file_location("_grid", Path(root) / "core" / "hyper_comm_grid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends absl for logging
        spec.loader.exec_module(module)
    return module
