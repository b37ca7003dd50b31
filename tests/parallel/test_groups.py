"""Which ranks share a process group."""

import pytest
import torch
import torch.distributed as dist

from parallel.groups import Groups, build_groups, single
from parallel.layout import Layout
from tests.ranks import run_ranks

AXES = ("dp", "ep", "expert_dp")


def members(rank: int, world_size: int, ep: int) -> dict[str, list[int] | None]:
    groups = build_groups(Layout(dp=world_size, ep=ep))
    assert groups.rank == rank
    found: dict[str, list[int] | None] = {}
    for axis in AXES:
        group = getattr(groups, axis)
        found[axis] = None if group is None else dist.get_process_group_ranks(group)
        if group is not None:  # it works, and reaches these ranks only
            total = torch.tensor(rank)
            dist.all_reduce(total, group=group)
            assert int(total) == sum(found[axis] or [])
    return found


@pytest.mark.parametrize(
    ("ep", "experts", "copies"),
    [
        (1, [None] * 4, [[0, 1, 2, 3]] * 4),
        (2, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        (4, [[0, 1, 2, 3]] * 4, [None] * 4),
    ],
)
def test_members(ep: int, experts: list[list[int] | None], copies: list[list[int] | None]) -> None:
    found = run_ranks(4, members, ep)
    assert [each["dp"] for each in found] == [[0, 1, 2, 3]] * 4
    assert [each["ep"] for each in found] == experts
    assert [each["expert_dp"] for each in found] == copies


def test_one_rank_needs_no_process_group() -> None:
    groups = build_groups(Layout(dp=1, ep=1))
    assert groups == single() == Groups(layout=Layout(dp=1, ep=1), rank=0, dp=None, ep=None, expert_dp=None)
