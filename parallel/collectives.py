"""Moving uneven rows between ranks, in flight or at once, with gradients; identity without a group.

`start_all_to_all` returns a `Wire`: the exchange is under way and `wait()` gives the rows. On gloo
that waits for a work handle, on NCCL it inserts a stream dependency; callers see one code path.
Legend: N rows, D columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Ranks in a group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This rank's place in a group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class Splits:
    """Rows that this rank sends to, and receives from, each rank of a group."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    group: Group

    def reversed(self) -> "Splits":
        """The way back: what was received is sent."""
        return Splits(self.receive, self.send, self.group)


@dataclass(frozen=True)
class Wire:
    """An exchange in flight. The sent tensor is held until the exchange is done."""

    received: Tensor
    sent: Tensor
    work: Any

    def wait(self) -> Tensor:
        """The received rows, once they are here."""
        if self.work is not None:
            self.work.wait()
        return self.received


def start_all_to_all(rows: Tensor, splits: Splits) -> Wire:
    """Put rows [N, ...], ordered by destination rank, on the wire. Every rank of the group must call."""
    if splits.group is None:
        return Wire(rows, rows, None)
    rows = rows.contiguous()
    received = rows.new_empty((sum(splits.receive), *rows.shape[1:]))
    work = dist.all_to_all_single(
        received, rows, list(splits.receive), list(splits.send), group=splits.group, async_op=True
    )
    return Wire(received, rows, work)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits) -> Tensor:
        ctx.splits = splits
        return start_all_to_all(rows, splits).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_all_to_all(grads[0], ctx.splits.reversed()).wait(), None


def all_to_all(rows: Tensor, splits: Splits) -> Tensor:
    """Exchange rows [N, ...] and wait; the gradient takes the way back."""
    if splits.group is None:
        return rows
    return _AllToAll.apply(rows, splits)


def all_reduce(tensor: Tensor, group: Group, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over a group and return the tensor."""
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def barrier(group: Group) -> None:
    """Wait for every rank of a group."""
    if group is not None:
        dist.barrier(group)
