"""Results on their way between the ranks of a pipeline: its channels, and what is in them.

Why nobody waits for ever: every channel (transfers.py) is a process group of its own. On NCCL the
operations of one group between two ranks run in the order of their issue on both sides, so that in one
group for all traffic a receive put up early would hold back the send behind it, here and there at once.
In a channel one side only sends and the other only receives, both in the same order (`check` proves it):
a message moves as soon as it is sent and its receive is up, whatever other channels do. No rank waits
for a send before its last slot, and every receive is up before it is waited for. So a rank stands
still only for a result that is not made yet, and `check` proves that this ends. Gloo orders less and
needs no more.
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
    """The hidden states between stages, and their gradients.

    `shapes`: of every microbatch, where they differ.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[tuple[int, ...], ...] = ()

    def shape_of(self, microbatch: int) -> tuple[int, ...]:
        """The shape of one microbatch's."""
        return self.shapes[microbatch] if self.shapes else self.shape


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
    assert group_size(group) == schedule.num_ranks, "a schedule for another group"
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


def disconnect(link: Link) -> None:
    """Close the channels. Collective in each pipeline, when nothing is on its way."""
    for channel in sorted(link.groups):
        dist.destroy_process_group(link.groups[channel])


def _open(link: Link, device: torch.device) -> None:
    """Send a number through every channel: NCCL opens one at first use, and there both ends wait."""
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
            shape = boundary.shape_of(message.result.microbatch)
            buffer = torch.empty(shape, dtype=boundary.dtype, device=boundary.device)
            work = dist.irecv(buffer, group=group, group_src=_other_end(group))
            self._arriving[message.result] = Wire(buffer, buffer, work)

    def take(self, result: Action) -> Tensor:
        """What an action of a neighbouring stage made, once it is here."""
        return self._arriving.pop(result).wait()

    def send(self, result: Action, value: Tensor) -> None:
        """Hand on what an action of this rank made, without waiting."""
        boundary = self._boundary
        expected = tuple(boundary.shape_of(result.microbatch)), boundary.dtype
        assert (tuple(value.shape), value.dtype) == expected, (
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
