"""Between our process groups and Megatron-Core's `ProcessGroupCollection`, in both directions.

Megatron's collection holds a group under every name, of one rank where an axis has degree 1; ours
holds None there, and has no use for some of its names. Importing this file imports megatron.core,
which takes seconds.
"""

from operator import itemgetter
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel.collectives import Group, ModelGroups, group_size
from parallel.errors import UserError
from parallel.groups import Groups, alike, create_group, embedding_group, is_end
from parallel.layout import DEGREES, Layout

_MODEL = {"tp": "tp", "cp": "cp", "tp_cp": "tp_cp", "ep": "ep", "etp": "expt_tp", "ep_etp": "tp_ep"}
_COPIES = {"dp": "dp", "pp": "pp", "dp_cp": "dp_cp", "tp_dp_cp": "tp_dp_cp", "expert_dp": "expt_dp"}
_GRIDS = (("tp", "cp", "dp", "pp"), ("etp", "ep", "expert_dp", "pp"))
_OTHER_AXES = {axis: [other for other in grid if other != axis] for grid in _GRIDS for axis in grid}


def model_groups(collection: ProcessGroupCollection) -> ModelGroups:
    """The groups that our layers compute with, from Megatron's, whatever the order of its axes.

    Raises `UserError` where the collection lacks one of these or of those that hold copies.
    """
    made = _take(collection, _MODEL | _COPIES)
    return ModelGroups(**{name: made[name] for name in _MODEL})


def from_megatron(collection: ProcessGroupCollection) -> Groups:
    """All our groups, from Megatron's. Collective: every rank of the initialised world must call.

    Raises `UserError` where one is lacking or the ranks stand in another order than in our layout.
    """
    made: dict[str, Any] = _take(collection, _MODEL | _COPIES)
    degrees: dict[str, Any] = {axis: group_size(made[axis]) for axis in DEGREES}
    rank, layout = dist.get_rank(), Layout(**degrees)
    for axis, others in _OTHER_AXES.items():
        group = made[axis]
        found = [rank] if group is None else dist.get_process_group_ranks(group)
        wanted = next(ranks for ranks in alike(layout, itemgetter(*others)) if rank in ranks)
        if found != wanted:  # every rank sees this: a step along an axis is the same from everywhere
            raise UserError(
                "Megatron's `order` must be `tp-cp-ep-dp-pp`, as in our layout, but along "
                f"{axis} rank {rank} stands with {found}, not {wanted}: set that order"
            )
    if layout.etp > 1 and made["expert_dp"] is not None:  # Megatron has none of these
        made["etp_expert_dp"] = create_group(layout, lambda at: (at["ep"], at["pp"]))
    else:
        made["etp_expert_dp"] = made["etp"] or made["expert_dp"]
    world = dist.group.WORLD if layout.world_size > 1 else None
    return Groups(layout=layout, rank=rank, embedding=embedding_group(layout), world=world, **made)


def to_megatron(groups: Groups) -> ProcessGroupCollection:
    """What a Megatron model, its data parallelism and its optimizers ask for, from our groups.

    Collective: every rank of the initialised world must call.
    """
    layout = groups.layout
    alone = create_group(layout, lambda at: (at["tp"], at["cp"], at["dp"], at["pp"]))
    shared = {theirs: getattr(groups, ours) or alone for ours, theirs in (_MODEL | _COPIES).items()}
    embd, pos_embd = alone, alone
    if layout.pp > 1:
        embd = create_group(layout, lambda at: (at["tp"], at["cp"], at["dp"]) if is_end(layout, at) else None)
        pos_embd = alone if groups.index("pp") == 0 else None
    return ProcessGroupCollection(
        **shared,
        mp=create_group(layout, lambda at: (at["cp"], at["dp"])),
        tp_ep_pp=create_group(layout, lambda at: at["expert_dp"]),
        embd=embd,
        pos_embd=pos_embd,
        intra_dp_cp=shared["dp_cp"],
        intra_expt_dp=shared["expt_dp"],
        intra_dist_opt=groups.world or alone,
        inter_dist_opt=None,
    )


def _take(collection: ProcessGroupCollection, names: dict[str, str]) -> dict[str, Group]:
    missing = [theirs for theirs in names.values() if getattr(collection, theirs, None) is None]
    if missing:
        raise UserError(
            f"`pg_collection` must hold {', '.join(names.values())}, but lacks {', '.join(missing)}: "
            "fill it, or take `ProcessGroupCollection.use_mpu_process_groups()`"
        )
    found = {ours: getattr(collection, theirs) for ours, theirs in names.items()}
    return {ours: group if group_size(group) > 1 else None for ours, group in found.items()}
