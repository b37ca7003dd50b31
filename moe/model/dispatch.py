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
from parallel.grouped import IN_ORDER, Order, take_rows


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

    @property
    def order(self) -> Order:
        """Rows as copies of tokens."""
        return Order(self.token_N, self.slot_TK)


@dataclass(frozen=True)
class Routed:
    """What the routed experts gave to one rank's tokens, and what was sent to them."""

    output: Tensor  # [T, D]: each token's rows, weighed and added up
    rows_E: Tensor  # int64: rows for each seat
    rows_M: Tensor | None  # int64: rows for each node, where these were sent first
    span: tuple[Any, Any]  # moments at which this rank's experts began and ended their forward


def make_plan(experts_TK: Tensor, num_experts: int) -> Plan:
    """Order assignments by expert; `experts_TK` holds E where there is nothing to send."""
    flat = experts_TK.flatten()
    rows_E = torch.bincount(flat, minlength=num_experts + 1)[:-1]
    sent = tuple(rows_E.tolist())
    order_N = flat.argsort(stable=True)[: sum(sent)]
    slot = torch.full_like(flat, -1)
    slot[order_N] = torch.arange(len(order_N), device=flat.device)
    return Plan(order_N, slot.view_as(experts_TK), rows_E, sent)


def within_capacity(experts_TK: Tensor, weights_TK: Tensor, num_experts: int, factor: float) -> Tensor:
    """The chosen experts with E in place of what is dropped.

    Of T tokens that are valid an expert takes at most ceil(factor * T * K / E) rows, those with the
    greatest weights.
    """
    flat, weights = experts_TK.flatten(), weights_TK.detach().flatten()
    by_weight = weights.argsort(descending=True, stable=True)
    order = by_weight[flat[by_weight].argsort(stable=True)]
    rows = torch.bincount(flat, minlength=num_experts + 1)
    place = torch.arange(len(flat), device=flat.device) - (rows.cumsum(0) - rows)[flat[order]]
    capacity = math.ceil(factor * int(rows[:-1].sum()) / num_experts - 1e-9)  # 1.1 * 80 / 8 is 11
    return flat.index_fill(0, order[place >= capacity], num_experts).view_as(experts_TK)


@dataclass(frozen=True)
class Delivery:
    """What arrives at this rank: splits of the exchange, rows per local expert, and their order.

    Rows arrive by source rank, then expert; `order` brings them into expert order and back. Where experts
    are cut over `etp`, every rank of that group needs the rows of all: `shared` are the splits by which each
    sends its own to all, and rows then lie by etp source, source, expert.
    """

    splits: Splits
    shared: Splits | None
    counts: tuple[int, ...]
    order: Order


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
        return Delivery(splits, shared, by_expert, IN_ORDER)
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
    return Delivery(splits, shared, by_expert, Order(order_N, slot_N[:, None]))


def spread(hidden: Tensor, weights_TK: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The rows [N, D] of hidden states [..., D], as they are sent, and the weight [N] of each."""
    return take_rows(hidden.flatten(0, -2), plan.order), weights_TK.flatten().index_select(0, plan.order_N)
