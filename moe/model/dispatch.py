"""Which rows go where: from chosen experts to rows in expert order, and back.

A `Plan` is the index arithmetic of one rank's tokens; it says nothing of other ranks. `Delivery` is
what a rank learns when every rank has told how many rows it sends. Moving the rows is
parallel/collectives.py's business. Where experts live elsewhere than in order, they go by their seats here
(experts.py). An exchange wants its splits on the host, so a layer's forward reads
two small tensors from the device, the rows it sends and those that it is sent; a backward reads none.
Legend: T tokens, K chosen experts, E experts, e experts of this rank, N rows, D hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import ModelGroups, Splits, Wire, group_rank, group_size, start_all_to_all


@dataclass(frozen=True)
class Plan:
    """Rows in expert order. An assignment without a row (padding, dropped) has slot -1."""

    order_N: Tensor  # assignment (t * K + k) of each row
    slot_TK: Tensor  # row of each assignment
    rows_E: Tensor  # int64: rows for each expert
    sent: tuple[int, ...]  # the same on the host

    @property
    def token_N(self) -> Tensor:
        """Token of each row."""
        return self.order_N // self.slot_TK.shape[1]


def make_plan(
    experts_TK: Tensor, weights_TK: Tensor, num_experts: int, capacity_factor: float | None
) -> Plan:
    """Order assignments by expert; `experts_TK` holds E where there is nothing to send.

    With a capacity factor c, an expert takes at most ceil(c * valid tokens * K / E) of these rows,
    those with the greatest weights.
    """
    flat = experts_TK.flatten()
    if capacity_factor is not None:
        flat = _within_capacity(flat, weights_TK.detach().flatten(), num_experts, capacity_factor)
    rows_E = torch.bincount(flat, minlength=num_experts + 1)[:-1]
    sent = tuple(rows_E.tolist())
    order_N = flat.argsort(stable=True)[: sum(sent)]
    slot = torch.full_like(flat, -1)
    slot[order_N] = torch.arange(len(order_N), device=flat.device)
    return Plan(order_N, slot.view_as(experts_TK), rows_E, sent)


def _within_capacity(flat: Tensor, weights: Tensor, num_experts: int, factor: float) -> Tensor:
    by_weight = weights.argsort(descending=True, stable=True)
    order = by_weight[flat[by_weight].argsort(stable=True)]
    rows = torch.bincount(flat, minlength=num_experts + 1)
    place = torch.arange(len(flat), device=flat.device) - (rows.cumsum(0) - rows)[flat[order]]
    capacity = math.ceil(factor * int(rows[:-1].sum()) / num_experts - 1e-9)  # 1.1 * 80 / 8 is 11
    return flat.index_fill(0, order[place >= capacity], num_experts)


@dataclass(frozen=True)
class Delivery:
    """What arrives at this rank: splits of the exchange, rows per local expert, and their order.

    Rows arrive by source rank, then expert; `order_N` brings them into expert order, `slot_N1` back.
    Both are None where the arrival order is expert order already. Where experts are cut over `etp`,
    every rank of that group needs the rows of all: `shared` are the splits by which each sends its own
    to all, and rows then lie by etp source, source, expert.
    """

    splits: Splits
    shared: Splits | None
    counts: tuple[int, ...]
    order_N: Tensor | None
    slot_N1: Tensor | None


def announce(plan: Plan, groups: ModelGroups) -> Wire:
    """Put the row counts [ep x etp, e] on the wire: every rank tells every other what it will send."""
    counts = plan.rows_E.view(group_size(groups.ep), -1).repeat_interleave(group_size(groups.etp), 0)
    each = (1,) * len(counts)
    return start_all_to_all(counts, Splits(each, each, groups.ep_etp))


def deliver(plan: Plan, arrived: Tensor, groups: ModelGroups) -> Delivery:
    """From the announced counts [ep x etp, e] of rows for this rank's experts to its delivery."""
    ranks, parts, num_local = group_size(groups.ep), group_size(groups.etp), arrived.shape[1]
    counts = arrived.view(ranks, parts, num_local).cpu()  # the rest is reckoned on the host
    sent = torch.tensor(plan.sent).view(ranks, num_local).sum(1)
    own = counts[:, group_rank(groups.etp)].sum(1)
    splits = Splits(tuple(sent.tolist()), tuple(own.tolist()), groups.ep)
    shared = None
    if groups.etp is not None:
        held = tuple(counts.sum((0, 2)).tolist())
        shared = Splits((sum(splits.receive),) * parts, held, groups.etp)
    by_expert = tuple(counts.sum((0, 1)).tolist())
    if ranks * parts == 1 or num_local == 1:
        return Delivery(splits, shared, by_expert, None, None)
    expert_N = (
        torch.arange(num_local, device=arrived.device)
        .repeat(ranks * parts)
        .repeat_interleave(
            arrived.view(ranks, parts, num_local).transpose(0, 1).flatten(), output_size=sum(by_expert)
        )
    )
    order_N = expert_N.argsort(stable=True)
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return Delivery(splits, shared, by_expert, order_N, slot_N[:, None])


class _TakeRows(torch.autograd.Function):
    """rows[index]; the gradient of a row is summed over its slots, in slot order: deterministic."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return rows.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _gather(grads[0], slot_TK).sum(1), None, None


def take_rows(rows: Tensor, index_N: Tensor, slot_TK: Tensor) -> Tensor:
    """Copy rows [T, D] to [N, D] by index; `slot_TK` lists where each row went, -1 for nowhere."""
    return _TakeRows.apply(rows, index_N, slot_TK)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(rows, weights_TK)
        ctx.plan = plan
        gathered = _gather(rows, plan.slot_TK).to(weights_TK.dtype)
        return torch.bmm(weights_TK[:, None], gathered)[:, 0].to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights_TK = ctx.saved_tensors
        plan, grad = ctx.plan, grads[0]
        weights_N = weights_TK.flatten()[plan.order_N].to(grad.dtype)
        grad_rows = grad.index_select(0, plan.token_N) * weights_N[:, None]
        gathered = _gather(rows, plan.slot_TK).to(weights_TK.dtype)
        grad_weights = torch.bmm(gathered, grad.to(weights_TK.dtype)[:, :, None])[:, :, 0]
        return grad_rows, grad_weights, None


def weighted_sum(rows: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """Sum each token's rows [N, D] by its weights: [T, D]; an assignment without a row adds nothing."""
    return _WeightedSum.apply(rows, weights_TK, plan)


def _gather(rows: Tensor, slot_TK: Tensor) -> Tensor:
    """rows[slot], zero where the slot is -1: [T, K, D]."""
    if rows.shape[0] == slot_TK.numel():
        return rows.index_select(0, slot_TK.flatten()).unflatten(0, slot_TK.shape)
    if rows.shape[0] == 0:
        return rows.new_zeros(*slot_TK.shape, rows.shape[1])
    gathered = rows.index_select(0, slot_TK.flatten().clamp_min(0)).unflatten(0, slot_TK.shape)
    return gathered.masked_fill((slot_TK < 0)[..., None], 0)
