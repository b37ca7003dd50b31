"""Moving tensors between ranks, in flight or at once, with gradients; identity without a group.

`start_all_to_all` returns a `Wire`: the exchange is under way and `wait()` gives the rows. On gloo
that waits for a work handle, on NCCL it inserts a stream dependency; callers see one code path.
`gather_sequence` and `scatter_sum` are the two ends of a tensor-parallel region: between them a rank
holds the whole sequence and a part of the weights, outside a stretch of the sequence.
Legend: N rows, B sequences, S positions, s positions of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


# Named anew in torch 2.13, which warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True)
class ModelGroups:
    """The groups that layers compute with; None where this rank stands alone, all None: the plain layer.

    `tp` cuts heads, dense widths and the vocabulary, and outside them the sequence; `cp` cuts the
    sequence for attention; `tp_cp`: ranks that together hold whole sequences. `ep` spreads experts,
    `etp` cuts each; `ep_etp`: ranks that together hold all experts whole. Where rows make two hops, `ep_rail`
    holds the ranks of equal place in each of the nodes over which `ep` reaches, and `ep_node` and
    `ep_etp_node` are what `ep` and `ep_etp` hold of this one.
    """

    tp: Group = None
    cp: Group = None
    tp_cp: Group = None
    ep: Group = None
    etp: Group = None
    ep_etp: Group = None
    ep_rail: Group = None
    ep_node: Group = None
    ep_etp_node: Group = None


ALONE = ModelGroups()


def group_size(group: Group) -> int:
    """Ranks in a group; 1 without one."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This rank's place in a group; 0 without one."""
    return 0 if group is None else group.rank()


class Packing(Protocol):
    """What rows [N, D] travel as."""

    def pack(self, rows: Tensor) -> Tensor:
        """[N, ...], row by row."""
        ...

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """What was packed, of the width and dtype of `like`: [M, D] from [M, ...]."""
        ...


@dataclass(frozen=True)
class Splits:
    """Rows that this rank sends to, and receives from, each rank of a group, packed if it is said how."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    group: Group
    packing: Packing | None = None

    def reversed(self) -> "Splits":
        """The way back: what was received is sent, as it is."""
        return Splits(self.receive, self.send, self.group)


@dataclass(frozen=True)
class Wire:
    """An exchange in flight. The sent tensor is held until the exchange is done."""

    received: Tensor
    sent: Tensor
    work: Any
    unpack: Callable[[Tensor], Tensor] | None = None

    def wait(self) -> Tensor:
        """The received rows, once they are here."""
        if self.work is not None:
            self.work.wait()
        return self.received if self.unpack is None else self.unpack(self.received)


def start_all_to_all(rows: Tensor, splits: Splits) -> Wire:
    """Put rows [N, ...], ordered by destination rank, on the wire. Every rank of the group must call."""
    if splits.group is None:
        return Wire(rows, rows, None)
    unpack, packing = None, splits.packing
    if packing is not None:
        like = rows.new_empty(0, *rows.shape[1:])  # and not the rows themselves, which need not be kept
        unpack, rows = partial(packing.unpack, like=like), packing.pack(rows)
    rows = rows.contiguous()
    received = rows.new_empty((sum(splits.receive), *rows.shape[1:]))
    work = dist.all_to_all_single(
        received, rows, list(splits.receive), list(splits.send), group=splits.group, async_op=True
    )
    return Wire(received, rows, work, unpack)


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


def start_all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> Any:
    """Fill `whole` with every rank's `part`, in rank order along dim 0; returns the work."""
    return _all_gather(whole, part, group=group, async_op=True)


def start_reduce_scatter(part: Tensor, whole: Tensor, group: dist.ProcessGroup) -> Any:
    """Sum `whole` over the ranks and fill `part` with this rank's stretch of dim 0; returns the work."""
    return _reduce_scatter(part, whole, group=group, async_op=True)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(grads[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_sum(whole, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.group), None


def gather_sequence(part: Tensor, group: Group) -> Tensor:
    """[B, s, ...] of every rank side by side: [B, S, ...]. The gradient is summed and scattered."""
    return part if group is None else _GatherSequence.apply(part, group)


def scatter_sum(whole: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of [B, S, ...], of which each keeps its stretch [B, s, ...]."""
    return whole if group is None else _ScatterSum.apply(whole, group)


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    whole = part.new_empty((ranks * part.shape[0], *part.shape[1:]))
    start_all_gather(whole, part.contiguous(), group).wait()
    return whole.unflatten(0, (ranks, -1)).movedim(0, 1).flatten(1, 2)


def _scatter_sum(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    by_rank = whole.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0)
    part = torch.empty_like(by_rank[0], memory_format=torch.contiguous_format)
    start_reduce_scatter(part, by_rank.flatten(0, 1).contiguous(), group).wait()
    return part


def group_ranks(group: Group) -> tuple[int, ...]:
    """The ranks of a group in the whole world, in its order; none without a group."""
    return () if group is None else tuple(dist.get_process_group_ranks(group))


def all_reduce(tensor: Tensor, group: Group, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over a group and return the tensor."""
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def barrier(group: Group) -> None:
    """Wait for every rank of a group."""
    if group is not None:
        dist.barrier(group)
