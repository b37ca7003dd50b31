"""Results on their way between the ranks of a pipeline: the channels, and what is in them.

Why this cannot deadlock: every channel (transfers.py) is a process group of its own. On NCCL the
operations of one group run one after the other in the order of their issue, on both sides, so a receive
that is put up early would hold back a send behind it; but here one side only sends, the other only
receives, and both in the same order (`check` proves it). By induction each message is delivered as soon
as it is sent and its receive is up. Nobody waits for a send before the end, and a receive is up before it is waited
for; so a rank stands still only where a result is not made yet, and `check` proves that this ends. On
gloo the operations are free of each other and the same holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Group, Wire, group_rank, group_size
from parallel.pipeline.action import Action, Schedule
from parallel.pipeline.check import check
from parallel.pipeline.transfers import Channel, channels, transfers


@dataclass(frozen=True)
class Boundary:
    """The hidden states between stages, alike for every microbatch; their gradients are alike too."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Link:
    """A rank's place in its pipeline, and the process group of each channel that it is an end of."""

    rank: int
    groups: Mapping[Channel, dist.ProcessGroup]


def connect(schedule: Schedule, group: Group, device: torch.device) -> Link:
    """Check a schedule and open its channels in every pipeline; rank r of `group` is the schedule's rank r.

    Collective: every rank of the world must call. Raises UserError where the schedule breaks a rule.
    """
    check(schedule)
    assert group_size(group) == schedule.num_ranks, (
        f"{schedule.num_ranks} ranks, but {group_size(group)} in group"
    )
    if group is None:
        return Link(0, {})
    mine = torch.tensor(dist.get_process_group_ranks(group), device=device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    groups = {}
    for pipeline in sorted({tuple(ranks.tolist()) for ranks in everyones}):
        for channel in channels(schedule):
            ends = [pipeline[channel.source], pipeline[channel.destination]]
            opened = dist.new_group(ends)  # every rank of the world must take part
            if dist.get_rank() in ends:
                groups[channel] = opened
    link = Link(group_rank(group), groups)
    _open(link, device)
    return link


def _open(link: Link, device: torch.device) -> None:
    """Send one number through every channel: NCCL sets a channel up at first use and both ends wait for it."""
    number = torch.zeros(1, device=device)
    for channel in sorted(link.groups):  # in the same order everywhere
        group = link.groups[channel]
        if channel.source == link.rank:
            dist.send(number, group=group, group_dst=_other_end(group))
        else:
            dist.recv(number, group=group, group_src=_other_end(group))


def _other_end(group: dist.ProcessGroup) -> int:
    return 1 - dist.get_rank(group)


class Mail:
    """What one rank receives and sends while it walks a schedule once, by the action that makes it."""

    def __init__(self, schedule: Schedule, link: Link, boundary: Boundary) -> None:
        self._transfers = transfers(schedule, link.rank)
        self._groups, self._boundary = link.groups, boundary
        self._arriving: dict[Action, Wire] = {}
        self._leaving: list[Wire] = []

    def put_up(self, slot: int) -> None:
        """Begin to receive what is due before this slot runs."""
        for message in self._transfers.receives[slot]:
            group, boundary = self._groups[message.channel], self._boundary
            buffer = torch.empty(boundary.shape, dtype=boundary.dtype, device=boundary.device)
            work = dist.irecv(buffer, group=group, group_src=_other_end(group))
            self._arriving[message.result] = Wire(buffer, buffer, work)

    def take(self, result: Action) -> Tensor:
        """What an action of a neighbouring stage made, once it is here."""
        return self._arriving.pop(result).wait()

    def send(self, result: Action, value: Tensor) -> None:
        """Hand on what an action of this rank made, without waiting."""
        boundary = self._boundary
        assert (tuple(value.shape), value.dtype) == (tuple(boundary.shape), boundary.dtype), (
            f"{result} made {tuple(value.shape)} of {value.dtype}, but the boundary is {boundary}"
        )
        channel = self._transfers.sends.get(result)
        if channel is None:  # the next stage is on this rank too
            self._arriving[result] = Wire(value, value, None)
            return
        group, value = self._groups[channel], value.contiguous()
        work = dist.isend(value, group=group, group_dst=_other_end(group))
        self._leaving = [wire for wire in self._leaving if not wire.work.is_completed()]
        self._leaving.append(Wire(value, value, work))

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for wire in self._leaving:
            wire.wait()
