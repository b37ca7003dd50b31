"""Which ranks share a process group: those whose other coordinates agree."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel.groups import Groups, build_groups, imagine, single
from parallel.layout import Layout
from tests.ranks import run_ranks

ATTENTION, EXPERTS = ("tp", "cp", "dp", "pp"), ("etp", "ep", "expert_dp", "pp")
SPANS = {  # the axes along which the members of a group differ
    "tp": (ATTENTION, {"tp"}),
    "cp": (ATTENTION, {"cp"}),
    "dp": (ATTENTION, {"dp"}),
    "pp": (ATTENTION, {"pp"}),
    "tp_cp": (ATTENTION, {"tp", "cp"}),
    "dp_cp": (ATTENTION, {"dp", "cp"}),
    "tp_dp_cp": (ATTENTION, {"tp", "dp", "cp"}),
    "world": (ATTENTION, {"tp", "cp", "dp", "pp"}),
    "etp": (EXPERTS, {"etp"}),
    "ep": (EXPERTS, {"ep"}),
    "ep_etp": (EXPERTS, {"ep", "etp"}),
    "expert_dp": (EXPERTS, {"expert_dp"}),
    "etp_expert_dp": (EXPERTS, {"etp", "expert_dp"}),
}


def expected(layout: Layout, rank: int, name: str) -> list[int] | None:
    """Members by brute force, in ascending order; None for this rank alone."""
    axes, free = SPANS[name]
    own = layout.coordinates(rank)
    members = [
        other
        for other in range(layout.world_size)
        if all(layout.coordinates(other)[axis] == own[axis] for axis in axes if axis not in free)
    ]
    return members if len(members) > 1 else None


def members(rank: int, world_size: int, layout: Layout) -> dict[str, list[int] | None]:
    groups = build_groups(layout)
    assert groups.rank == rank
    found: dict[str, list[int] | None] = {}
    for name in (*SPANS, "embedding"):
        group = getattr(groups, name)
        found[name] = None if group is None else dist.get_process_group_ranks(group)
        if group is not None:  # it works, and reaches these ranks only
            total = torch.tensor(rank)
            dist.all_reduce(total, group=group)
            assert int(total) == sum(found[name] or [])
    return found


LAYOUTS = [
    Layout(dp=4),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=4),
    Layout(tp=2, pp=2, ep=2),
    Layout(tp=2, dp=2, ep=4),
    Layout(tp=2, dp=2, ep=2, etp=2),
    Layout(tp=2, cp=2, dp=2, ep=4),
    Layout(cp=2, dp=2, pp=2, ep=2, etp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_members(layout: Layout) -> None:
    for rank, found in enumerate(run_ranks(layout.world_size, members, layout)):
        for name in SPANS:
            assert found[name] == expected(layout, rank, name), (name, rank)


def test_two_hops_have_a_group_inside_a_node_and_one_across_nodes() -> None:
    layout = Layout(dp=8, ep=4, etp=2, node=4)
    straight, hops = (run_ranks(8, hop_members, each) for each in (replace(layout, node=None), layout))
    for rank, found in enumerate(hops):
        other = (rank + 4) % 8
        assert found["ep_rail"] == sorted((rank, other))
        assert found["ep_node"] == sorted((rank, rank ^ 2))
        assert found["ep_etp_node"] == list(range(rank // 4 * 4, rank // 4 * 4 + 4))
        assert found["ep"] == list(range(rank % 2, 8, 2)) and found["ep_etp"] == list(range(8))
        assert all(straight[rank][name] is None for name in ("ep_rail", "ep_node", "ep_etp_node"))
        known = imagine(layout, rank)
        for name, ranks in found.items():
            group = getattr(known, name)
            assert ranks is not None and (group.size(), group.rank()) == (len(ranks), ranks.index(rank))


def hop_members(rank: int, world_size: int, layout: Layout) -> dict[str, list[int] | None]:
    groups = build_groups(layout)
    names = ("ep", "ep_etp", "ep_rail", "ep_node", "ep_etp_node")
    held = {name: getattr(groups, name) for name in names}
    return {n: None if group is None else dist.get_process_group_ranks(group) for n, group in held.items()}


def test_order_within_a_group_follows_the_axis() -> None:
    """Rank i of the tp x ep group is coordinate i: cut weights and announced counts rely on it."""
    layout = Layout(tp=2, dp=2, ep=2, etp=2)
    for rank, found in enumerate(run_ranks(4, members, layout)):
        for name in ("tp", "ep", "etp"):
            group = found[name]
            assert group is not None and group.index(rank) == layout.coordinates(rank)[name]
        place = layout.coordinates(rank)
        assert found["ep_etp"] is not None
        assert found["ep_etp"].index(rank) == place["ep"] * 2 + place["etp"]


def test_first_and_last_stage_share_what_both_hold() -> None:
    found = run_ranks(6, members, Layout(tp=2, pp=3))
    assert [each["embedding"] for each in found] == [[0, 4], [1, 5], None, None, [0, 4], [1, 5]]


def copies(rank: int, world_size: int, layout: Layout) -> dict[str, list[int] | None]:
    groups = build_groups(layout)
    assert groups.is_first_copy == (layout.coordinates(rank)["pp"] < layout.pp // 2)
    held = vars(groups.copies) | {"mirror": groups.mirror}
    return {name: None if each is None else dist.get_process_group_ranks(each) for name, each in held.items()}


def test_both_ways_copies_are_on_a_stage_and_its_mirror() -> None:
    """Four stages of two ranks: those of stage 1 are the neighbours 2, 3 and of its mirror 4, 5."""
    found = run_ranks(8, copies, Layout(tp=2, pp=4, ep=2, both_ways=True))
    pairs = [[0, 6], [1, 7], [2, 4], [3, 5]]
    assert [each["mirror"] for each in found] == [*pairs, *pairs[2:], *pairs[:2]]
    for rank, each in enumerate(found):
        stage = [0, 1, 6, 7] if rank in (0, 1, 6, 7) else [2, 3, 4, 5]
        assert each["whole"] == stage
        assert each["cut"] == each["experts"] == each["experts_whole"] == each["mirror"]
    wide = run_ranks(4, copies, Layout(dp=2, pp=2, both_ways=True))
    assert all(each["experts"] == each["cut"] == each["whole"] == [0, 1, 2, 3] for each in wide)
    narrow = run_ranks(4, copies, Layout(dp=2, pp=2, etp=2, both_ways=True))
    for each in narrow:
        assert each["experts"] == each["mirror"] and each["experts_whole"] == [0, 1, 2, 3]


def test_one_rank_needs_no_process_group() -> None:
    groups = build_groups(Layout())
    assert groups == single() == Groups(layout=Layout(), rank=0)
