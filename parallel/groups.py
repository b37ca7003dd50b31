"""Process groups in Megatron's fashion, built once with its own grid and passed down as one value.

`HyperCommGrid` needs no globals. Its file is loaded by itself: importing the package around it
costs every rank four seconds and warns of accelerator libraries that nothing here uses.
"""

import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

from parallel.collectives import Group, ModelGroups, group_rank, group_size
from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The ranks that hold copies of what is cut over tp, of what is whole on a stage, and of experts.

    `experts` of what is cut over etp, `experts_whole` of what is whole in an expert that is cut.
    """

    cut: Group = None
    whole: Group = None
    experts: Group = None
    experts_whole: Group = None


@dataclass(frozen=True, kw_only=True)
class Groups(ModelGroups):
    """A rank's process groups; None where a group would hold this rank alone.

    Beside those that layers compute with: on a stage `dp_cp` holds the copies of what is cut over tp,
    `tp_dp_cp` (the stage) those of what is whole, `expert_dp` those of experts cut over etp and
    `etp_expert_dp` those of what is whole in them; `embedding` the copies on the first and last stage of
    what is cut over tp; `pp` the stages; `world` every rank. Where the pipeline runs both ways, `mirror`
    holds this rank and the one that holds the same stages, and `both_ways` the copies on both.
    """

    layout: Layout
    rank: int
    dp: Group = None
    pp: Group = None
    dp_cp: Group = None
    tp_dp_cp: Group = None
    expert_dp: Group = None
    etp_expert_dp: Group = None
    embedding: Group = None
    mirror: Group = None
    both_ways: Copies | None = None
    world: Group = None

    @property
    def copies(self) -> Copies:
        """Whose gradients are added up."""
        return self.both_ways or Copies(
            cut=self.dp_cp,
            whole=self.tp_dp_cp,
            experts=self.expert_dp,
            experts_whole=self.etp_expert_dp,
        )

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank speaks for its stages: of a rank and its mirror one does."""
        return group_rank(self.mirror) == 0

    def index(self, axis: str) -> int:
        """This rank's place along an axis of the layout."""
        return self.layout.coordinates(self.rank)[axis]


def single() -> Groups:
    """The groups of a run on one rank: none."""
    return Groups(layout=Layout(), rank=0)


_ATTENTION = ("tp", "cp", "dp", "pp")  # of several axes the first varies fastest
_EXPERTS = ("etp", "ep_node", "ep_rail", "expert_dp", "pp")
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
_EXPERT_GROUPS = {
    "etp": ["etp"],
    "ep": ["ep_node", "ep_rail"],
    "ep_etp": ["etp", "ep_node", "ep_rail"],
    "expert_dp": ["expert_dp"],
    "etp_expert_dp": ["etp", "expert_dp"],
}
_HOP_GROUPS = {
    "ep_rail": ["ep_rail"],
    "ep_node": ["ep_node"],
    "ep_etp_node": ["etp", "ep_node"],
}


def _expert_groups(layout: Layout) -> dict[str, list[str]]:
    return _EXPERT_GROUPS if layout.node is None else _EXPERT_GROUPS | _HOP_GROUPS


def build_groups(layout: Layout) -> Groups:
    """Build every group of a layout. Collective: every rank of the initialised world must call."""
    if layout.world_size == 1:
        return single()
    assert dist.get_world_size() == layout.world_size
    made: dict[str, Any] = _build(layout, _ATTENTION, _ATTENTION_GROUPS) | _build(
        layout, _EXPERTS, _expert_groups(layout)
    )
    groups = Groups(layout=layout, rank=dist.get_rank(), embedding=embedding_group(layout), **made)
    return _with_mirrors(groups) if layout.both_ways else groups


def imagine(layout: Layout, rank: int) -> Groups:
    """The groups of any rank of a layout, in one process: they know size and place, and can send nothing.

    What is built over them, on the meta device say, has the shapes that it has on that rank.
    """
    place = layout.coordinates(rank)
    made: dict[tuple[str, ...], Group] = {(): None}

    def along(several: Sequence[str]) -> Group:
        long = tuple(axis for axis in several if getattr(layout, axis) > 1)
        if long not in made:
            size, index = 1, 0
            for axis in long:
                size, index = size * getattr(layout, axis), index + place[axis] * size
            made[long] = _silent(index, size)
        return made[long]

    def twice(group: Group, on_later_stage: bool) -> Group:
        """The same ranks of two stages."""
        size = group_size(group)
        return _silent(group_rank(group) + on_later_stage * size, 2 * size)

    found: dict[str, Any] = {
        name: along(several) for name, several in (_ATTENTION_GROUPS | _expert_groups(layout)).items()
    }
    groups = Groups(layout=layout, rank=rank, **found)
    if layout.pp > 1 and is_end(layout, place):
        groups = replace(groups, embedding=twice(groups.dp_cp, place["pp"] > 0))
    if layout.both_ways:
        later = place["pp"] > _depth(layout, place)
        once = groups.copies
        experts = twice(once.experts, later)
        copies = Copies(
            cut=twice(once.cut, later),
            whole=twice(once.whole, later),
            experts=experts,
            experts_whole=twice(once.experts_whole, later) if layout.etp > 1 else experts,
        )
        groups = replace(groups, mirror=twice(None, later), both_ways=copies)
    return groups


def _silent(rank: int, size: int) -> dist.ProcessGroup:
    """A group without a backend."""
    return dist.ProcessGroup(rank, size)  # type: ignore[call-arg]  # the stub lacks this constructor


def embedding_group(layout: Layout) -> Group:
    """Copies of what the first and the last stage both hold, where there are two. Collective."""
    if layout.pp == 1:
        return None
    return create_group(layout, lambda at: at["tp"] if is_end(layout, at) else None)


def _with_mirrors(groups: Groups) -> Groups:
    layout = groups.layout

    def both(*axes: str) -> Group:
        """Ranks that differ only along these axes, on a stage and on its mirror."""
        grid = _EXPERTS if "expert_dp" in axes else _ATTENTION
        kept = [axis for axis in grid if axis not in (*axes, "pp")]
        return create_group(layout, lambda at: (_depth(layout, at), *(at[axis] for axis in kept)))

    experts = both("expert_dp")
    copies = Copies(
        cut=both("cp", "dp"),
        whole=both("tp", "cp", "dp"),
        experts=experts,
        experts_whole=both("etp", "expert_dp") if layout.etp > 1 else experts,
    )
    return replace(groups, mirror=both(), both_ways=copies)


def _depth(layout: Layout, place: dict[str, int]) -> int:
    """The same for a rank of the pipeline and its mirror."""
    return min(place["pp"], layout.pp - 1 - place["pp"])


def is_end(layout: Layout, place: dict[str, int]) -> bool:
    """Whether the rank at these coordinates is the first or the last of its pipeline."""
    return place["pp"] in (0, layout.pp - 1)


def create_group(layout: Layout, key: Callable[[dict[str, int]], Hashable]) -> Group:
    """A group for each set of ranks whose coordinates have the same key; none for those whose key is None.

    Collective: every rank makes every group, as `torch.distributed` wants it.
    """
    mine = None
    for ranks in alike(layout, key):
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    return mine


def alike(layout: Layout, key: Callable[[dict[str, int]], Hashable]) -> list[list[int]]:
    """The sets of ranks whose coordinates have the same key, which is not None."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        found[key(layout.coordinates(rank))].append(rank)
    found.pop(None, None)
    return list(found.values())


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
