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

from parallel.collectives import Group, ModelGroups
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Groups(ModelGroups):
    """A rank's process groups; None where a group would hold this rank alone.

    Beside those that layers compute with: `dp_cp` holds the copies of what is cut over tp, `tp_dp_cp`
    (the stage) those of what is whole, `expert_dp` those of experts; `embedding` the copies on the first
    and last stage of what is cut over tp; `pp` the stages; `world` every rank.
    """

    layout: Layout
    rank: int
    dp: Group = None
    pp: Group = None
    dp_cp: Group = None
    tp_dp_cp: Group = None
    expert_dp: Group = None
    embedding: Group = None
    world: Group = None

    def index(self, axis: str) -> int:
        """This rank's place along an axis of the layout."""
        return self.layout.coordinates(self.rank)[axis]


def single() -> Groups:
    """The groups of a run on one rank: none."""
    return Groups(layout=Layout(), rank=0)


_ATTENTION = ("tp", "cp", "dp", "pp")  # of several axes the first varies fastest
_EXPERTS = ("etp", "ep", "expert_dp", "pp")
_ATTENTION_GROUPS = {
    "tp": ["tp"],
    "cp": ["cp"],
    "dp": ["dp"],
    "pp": ["pp"],
    "tp_cp": ["tp", "cp"],
    "dp_cp": ["cp", "dp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
    "world": ["tp", "cp", "dp", "pp"],
}
_EXPERT_GROUPS = {"etp": ["etp"], "ep": ["ep"], "ep_etp": ["etp", "ep"], "expert_dp": ["expert_dp"]}


def build_groups(layout: Layout) -> Groups:
    """Build every group of a layout. Collective: every rank of the initialised world must call."""
    if layout.world_size == 1:
        return single()
    assert dist.get_world_size() == layout.world_size
    made = _build(layout, _ATTENTION, _ATTENTION_GROUPS) | _build(layout, _EXPERTS, _EXPERT_GROUPS)
    return Groups(layout=layout, rank=dist.get_rank(), embedding=_embedding_group(layout), **made)


def _build(layout: Layout, axes: tuple[str, ...], wanted: dict[str, list[str]]) -> dict[str, Group]:
    """Groups by name; two names that mean the same ranks share a group."""
    grid = _grid_module().HyperCommGrid([getattr(layout, axis) for axis in axes], list(axes))
    made: dict[tuple[str, ...], Group] = {(): None}
    for several in wanted.values():
        long = tuple(axis for axis in several if getattr(layout, axis) > 1)
        if long not in made:
            made[long] = grid.create_pg(list(long))
    return {
        name: made[tuple(axis for axis in several if getattr(layout, axis) > 1)]
        for name, several in wanted.items()
    }


def _embedding_group(layout: Layout) -> Group:
    """Copies of what the first and the last stage both hold, where there are two."""
    if layout.pp == 1:
        return None
    mine, rank, size = None, dist.get_rank(), layout.stage_size
    for tp in range(layout.tp):
        first = range(tp, size, layout.tp)
        ranks = [*first, *(each + size * (layout.pp - 1) for each in first)]
        group = dist.new_group(ranks)
        mine = group if rank in ranks else mine
    return mine


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
