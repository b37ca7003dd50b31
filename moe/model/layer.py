"""The Mixture-of-Experts layer: route, dispatch, experts, combine, with shared experts beside them.

`phases` is the whole layer as straight-line code: it yields whenever its rows are on the wire, so a
schedule can run another microbatch there. Without a group it is the plain layer:

    output = MoELayer(ModelConfig())(torch.randn(2, 16, 256))

Legend: B sequences, S positions, D hidden size, T = B S tokens, E experts.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.dispatch import Delivery, Plan, Routed, announce, deliver, make_plan, spread, within_capacity
from moe.model.experts import Experts, Placement, in_order
from moe.model.init import init_weights
from moe.model.mlp import SwiGLU
from moe.model.router import Router, Routing, Signals
from moe.model.two_hop import two_hop_phases
from parallel.collectives import ALONE, ModelGroups, Packing, group_size
from parallel.grouped import sum_rows
from parallel.pipeline.tape import Direct, Recorder, moment, run


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What one layer did with one microbatch: whom it chose and what it sent. Detached, exact."""

    experts_TK: Tensor  # chosen experts; E on padding
    counts_E: Tensor  # int64: assignments of valid tokens
    rows_E: Tensor  # int64: rows sent to each seat; fewer than the counts where capacity dropped some
    rows_M: Tensor | None  # int64: rows sent to each node, where they make two hops
    gates_E: Tensor  # fp64: the sum of the weights by which valid tokens chose it
    auxiliary_loss: Tensor
    signals: Signals
    span: tuple[Any, Any]  # moments at which this rank's experts began and ended their forward


class MoELayer(nn.Module):
    """Routed experts, spread over `ep` and each cut over `etp`, and shared experts, cut over `tp`.

    Wherever there is a group: without any this is the plain layer. With `tp` a rank holds a stretch
    of the sequence.
    """

    seats: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig | None = None,
        groups: ModelGroups = ALONE,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
        placement: Placement | None = None,
    ) -> None:
        """With `seed` None the weights are left uninitialised, for the model to fill.

        `placement`: which expert lives where; None keeps them in order.
        """
        super().__init__()
        self.config, self.groups = config, groups
        self.packing: Packing | None = None  # of rows on their way to their experts
        self.router = Router(config, balance or BalanceConfig(), dtype, groups.tp_cp)
        placement = placement or in_order(config.num_experts)
        self.experts = Experts(config, groups, dtype, placement)
        seats = None  # of each expert, and beyond them that of padding, which has none
        if placement.order != in_order(config.num_experts).order:
            seats = torch.tensor((*placement.seats, config.num_experts))
        self.register_buffer("seats", seats, persistent=False)
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared = SwiGLU(config.hidden_size, shared_width, groups.tp, dtype) if shared_width else None
        if seed is not None:
            init_weights(self, config.init_std, seed)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D], through ordinary autograd; auxiliary losses are left out."""
        valid = (
            torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if valid is None else valid
        )
        return run(self.phases(Direct(), hidden, valid))[0]

    def phases(
        self, tape: Recorder, hidden: Tensor, valid: Tensor, auxiliary_share: float = 1.0
    ) -> Generator[None, None, tuple[Tensor, LayerLoad]]:
        """Hidden states [B, S, D] (of this rank) -> the layer's output [B, S, D] and its load.

        `valid` [B, S] is false on padding. `auxiliary_share` is this microbatch's part of the global
        batch, by which the auxiliary loss (a mean) counts.
        """
        weights, auxiliary, routing = tape.compute(self.router, hidden, valid)
        tape.root(auxiliary, auxiliary_share)
        seats_TK = routing.experts_TK if self.seats is None else self.seats[routing.experts_TK]
        num_experts, factor = self.config.num_experts, self.config.capacity_factor
        if factor is not None:
            seats_TK = within_capacity(seats_TK, weights, num_experts, factor)
        if self.groups.ep_etp is None:
            shared = self._run_shared(tape, hidden)
            routed = self._one_rank(tape, hidden, seats_TK, weights, shared)
            return routed.output, self._load(routing, weights, routed, auxiliary)
        if self.groups.ep_rail is None:
            steps = self._one_hop_phases(tape, hidden, seats_TK, weights, self.groups)
        else:
            steps = two_hop_phases(
                *(tape, hidden, seats_TK, weights, num_experts, self.groups, self._one_hop_phases),
                packing=self.packing,
            )
        next(steps)  # to where the rows are on the wire
        shared = self._run_shared(tape, hidden)
        yield
        routed = yield from steps
        output = tape.compute(_join, routed.output, shared, hidden.shape)
        return output, self._load(routing, weights, routed, auxiliary)

    def _run_shared(self, tape: Recorder, hidden: Tensor) -> Tensor | None:
        return None if self.shared is None else tape.compute(self.shared, hidden)

    def _one_rank(
        self, tape: Recorder, hidden: Tensor, seats_TK: Tensor, weights_TK: Tensor, shared: Tensor | None
    ) -> Routed:
        """All experts are here: no row is copied to be sent, and the shared experts' output is joined."""
        plan = make_plan(seats_TK, self.config.num_experts)
        begin = moment(hidden.device)
        output = tape.compute(self._run_here, hidden, weights_TK, shared, plan)
        return Routed(output, plan.rows_E, None, (begin, moment(hidden.device)))

    def _one_hop_phases(
        self, tape: Recorder, hidden: Tensor, seats_TK: Tensor, weights_TK: Tensor, groups: ModelGroups
    ) -> Generator[None, None, Routed]:
        """Hidden states [..., D] to the seats of a group, each row with its weight, and back as sums."""
        num_local = self.config.num_experts // group_size(self.groups.ep)
        plan = make_plan(seats_TK, num_local * group_size(groups.ep))
        announced = announce(plan, groups)
        rows, weights_N = tape.compute(spread, hidden, weights_TK, plan)  # while the counts travel
        delivery = deliver(plan, announced.wait(), groups)
        packed = replace(delivery.splits, packing=self.packing)
        sent = tape.exchange(rows, packed), tape.exchange(weights_N, delivery.splits)
        yield
        rows, weights_N = (part.wait() for part in sent)
        rows, span = yield from self._expert_phases(tape, rows, weights_N, delivery)
        returned = tape.exchange(rows, delivery.splits.reversed())
        yield
        output = tape.compute(sum_rows, returned.wait(), plan.order)
        return Routed(output, plan.rows_E, None, span)

    def _load(self, routing: Routing, weights_TK: Tensor, routed: Routed, auxiliary: Tensor) -> LayerLoad:
        gates_E = weights_TK.new_zeros(self.config.num_experts + 1, dtype=torch.float64)
        gates_E.index_add_(0, routing.experts_TK.flatten(), weights_TK.detach().flatten().double())
        return LayerLoad(
            experts_TK=routing.experts_TK,
            counts_E=routing.counts_E,
            rows_E=routed.rows_E,
            rows_M=routed.rows_M,
            gates_E=gates_E[:-1],
            auxiliary_loss=auxiliary.detach(),
            signals=routing.signals,
            span=routed.span,
        )

    def _expert_phases(
        self, tape: Recorder, rows: Tensor, weights_N: Tensor, delivery: Delivery
    ) -> Generator[None, None, tuple[Tensor, tuple[Any, Any]]]:
        shared = delivery.shared
        if shared is not None:
            parts = [tape.compute(_repeat, part, len(shared.send)) for part in (rows, weights_N)]
            gathered = [tape.exchange(part, shared) for part in parts]
            yield
            rows, weights_N = (part.wait() for part in gathered)
        begin = moment(rows.device)
        rows = tape.compute(self._run_arrived, rows, weights_N, delivery)
        span = begin, moment(rows.device)
        if shared is not None:
            summands = tape.exchange(rows, shared.reversed())
            yield
            rows = tape.compute(_add_up, summands.wait(), len(shared.send))
        return rows, span

    def _run_arrived(self, rows: Tensor, weights_N: Tensor, delivery: Delivery) -> Tensor:
        order = delivery.order
        if order.index_N is not None:
            weights_N = weights_N.index_select(0, order.index_N)
        return self.experts(rows, weights_N, order, delivery.counts)

    def _run_here(self, hidden: Tensor, weights_TK: Tensor, shared: Tensor | None, plan: Plan) -> Tensor:
        weights_N = weights_TK.flatten().index_select(0, plan.order_N)
        routed = self.experts(hidden.flatten(0, 1), weights_N, plan.order, plan.sent)
        return _join(routed, shared, hidden.shape)


def _repeat(rows: Tensor, times: int) -> Tensor:
    return rows.repeat(times, *[1] * (rows.dim() - 1))


def _add_up(rows: Tensor, times: int) -> Tensor:
    return rows.unflatten(0, (times, -1)).sum(0)


def _join(routed: Tensor, shared: Tensor | None, shape: torch.Size) -> Tensor:
    return routed.view(shape) if shared is None else routed.view(shape) + shared
