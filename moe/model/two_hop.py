"""Dispatch in two hops: a token crosses the network once to each node that holds some of its experts.

The fast links end at the node. Sent straight, a token that chose three experts of one node crosses the
network three times; here its row goes once, to the rank of that node with the sender's own place in it,
and brings along which experts it chose there and their weights. To the node that row is a token of an
ordinary layer, whose experts are the node's own: they are reached, weighed and added up by the ordinary
phases over fast links, and one row returns. The outer hop is itself an ordinary dispatch, to nodes in place
of experts. How many nodes a token reaches is bounded by `model.top_groups`, where a node is a group.
(Node-limited routing and this order of hops: DeepSeek-V3, 2412.19437, section 3.2.2.)
Legend: T tokens, K chosen experts, M nodes, N rows, J = min(K, M) nodes at most of a token, D hidden size.
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from moe.model.dispatch import Plan, Routed, announce, deliver, make_plan
from parallel.collectives import ModelGroups, Packing, group_size, start_all_to_all
from parallel.grouped import sum_rows, take_rows
from parallel.pipeline.tape import Recorder


class OneHop(Protocol):
    """The ordinary phases: hidden states [..., D] to the seats of a group of ranks, and back as sums."""

    def __call__(
        self, tape: Recorder, hidden: Tensor, seats_TK: Tensor, weights_TK: Tensor, groups: ModelGroups
    ) -> Generator[None, None, Routed]:
        """Seats count from 0 at the group's first rank; beyond its last is none, whatever its weight."""
        ...


def two_hop_phases(
    tape: Recorder,
    hidden: Tensor,
    seats_TK: Tensor,
    weights_TK: Tensor,
    num_seats: int,
    groups: ModelGroups,
    one_hop: OneHop,
    packing: Packing | None = None,
) -> Generator[None, None, Routed]:
    """Hidden states [..., D] to their seats and back; `seats_TK` holds `num_seats` where there is none.

    `packing`: what rows travel as over the network; in the node that is up to `one_hop`.
    """
    rail = ModelGroups(ep=groups.ep_rail, ep_etp=groups.ep_rail)
    node = ModelGroups(ep=groups.ep_node, etp=groups.etp, ep_etp=groups.ep_etp_node)
    each = num_seats // group_size(groups.ep_rail)
    nodes_TJ = nodes_of(seats_TK, num_seats, each)
    plan = make_plan(nodes_TJ, num_seats // each)
    announced = announce(plan, rail)
    rows, weights_NK = tape.compute(_leave, hidden, weights_TK, plan)
    seats_NK = _seats_there(seats_TK, nodes_TJ, plan, each)
    splits = deliver(plan, announced.wait(), rail).splits
    arriving_seats = start_all_to_all(seats_NK.int(), splits)
    arriving_weights = tape.exchange(weights_NK, splits)
    arriving = tape.exchange(rows, replace(splits, packing=packing))
    yield
    seats, weights = arriving_seats.wait().long(), arriving_weights.wait()
    inner = yield from one_hop(tape, arriving.wait(), seats, weights, node)
    returned = tape.exchange(inner.output, splits.reversed())
    yield
    output = tape.compute(sum_rows, returned.wait(), plan.order)
    rows_E = torch.bincount(seats_TK.flatten(), minlength=num_seats + 1)[:-1]
    return replace(inner, output=output, rows_E=rows_E, rows_M=plan.rows_E)


def nodes_of(seats_TK: Tensor, num_seats: int, each: int) -> Tensor:
    """The nodes of `each` seats where a token's seats are, each node once, then M for none: [T, J]."""
    num_nodes = num_seats // each
    reached_TM = torch.zeros(len(seats_TK), num_nodes + 1, dtype=torch.bool, device=seats_TK.device)
    reached_TM = reached_TM.scatter_(1, seats_TK // each, True)[:, :num_nodes]
    nodes_TM = torch.arange(num_nodes, device=seats_TK.device).where(reached_TM, num_nodes)
    return nodes_TM.sort(1).values[:, : seats_TK.shape[1]]


def _seats_there(seats_TK: Tensor, nodes_TJ: Tensor, plan: Plan, each: int) -> Tensor:
    """Of each row its token's seats as its node counts them, `each` in place of those elsewhere."""
    first_N1 = nodes_TJ.flatten()[plan.order_N][:, None] * each
    seats_NK = seats_TK[plan.token_N] - first_N1
    return seats_NK.masked_fill((seats_NK < 0) | (seats_NK >= each), each)


def _leave(hidden: Tensor, weights_TK: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return take_rows(hidden.flatten(0, -2), plan.order), take_rows(weights_TK, plan.order)
