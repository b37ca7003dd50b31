"""Our groups as Megatron's collection and back: the same ranks that Megatron itself puts together.

Every rank in turn is played by this process, on a backend that knows its members and moves nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.collectives import Group, ModelGroups
from parallel.errors import UserError
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.megatron import from_megatron, model_groups, to_megatron

LAYOUTS = (
    Layout(tp=2, pp=2, dp=2, ep=4),
    Layout(tp=2, cp=2, dp=2, ep=4, etp=2),
    Layout(cp=2, pp=3, ep=2),
    Layout(dp=4, ep=2),
    Layout(tp=2),
)
UNUSED = {"hcp", "inter_dist_opt"}  # only where contexts or optimizers have levels


@contextmanager
def playing(rank: int, layout: Layout, order: str = "tp-cp-ep-dp-pp") -> Iterator[ProcessGroupCollection]:
    """This process as one rank of many; gives Megatron's own groups."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
            order=order,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def members(holder: Any) -> dict[str, list[int] | None]:
    """The ranks of every group that a value holds."""
    groups: dict[str, Group] = {
        field.name: getattr(holder, field.name)
        for field in fields(holder)
        if field.name not in {"layout", "rank", *UNUSED}
    }
    return {name: group and dist.get_process_group_ranks(group) for name, group in groups.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_both_directions_give_the_ranks_that_megatron_gives(layout: Layout) -> None:
    for rank in range(layout.world_size):
        with playing(rank, layout) as theirs:
            ours = build_groups(layout)
            made = to_megatron(ours)
            assert members(made) == members(theirs)
            for collection in (made, theirs):
                found = from_megatron(collection)
                assert (found.layout, found.rank) == (layout, rank)
                assert members(found) == members(ours)
                for field in fields(ModelGroups):
                    assert getattr(model_groups(collection), field.name) is getattr(found, field.name)


def test_layers_take_groups_of_any_order_but_the_layout_has_one() -> None:
    for rank in range(8):  # each must see it, or the others would wait
        with playing(rank, Layout(tp=2, pp=2, dp=2, ep=2), order="tp-cp-ep-pp-dp") as theirs:
            first = rank // 2 * 2
            assert members(model_groups(theirs))["ep"] == [first, first + 1]
            with pytest.raises(UserError, match="`order` must be `tp-cp-ep-dp-pp`, as in our layout, but"):
                from_megatron(theirs)


def test_a_collection_without_a_group_is_refused() -> None:
    with pytest.raises(UserError, match="lacks cp, tp_cp, ep, expt_tp, tp_ep, dp, pp,"):
        model_groups(ProcessGroupCollection(tp=object()))
