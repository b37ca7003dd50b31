"""The Mixture-of-Experts layer: route, dispatch, experts, combine, with shared experts beside them.

`phases` is the whole layer as straight-line code: it yields whenever its rows are on the wire, so a
schedule can run another microbatch there. Without a group it is the plain layer:

    output = MoELayer(ModelConfig())(torch.randn(2, 16, 256))

Legend: B sequences, S positions, D hidden size, T = B S tokens, E experts.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.dispatch import Delivery, Plan, announce, deliver, make_plan, take_rows, weighted_sum
from moe.model.experts import Experts, Placement, in_order
from moe.model.init import init_weights
from moe.model.mlp import SwiGLU
from moe.model.router import Router, Routing, Signals
from parallel.collectives import ALONE, ModelGroups
from parallel.pipeline.tape import Direct, Recorder, moment, run


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What one layer did with one microbatch: whom it chose and what it sent. Detached, exact."""

    experts_TK: Tensor  # chosen experts; E on padding
    counts_E: Tensor  # int64: assignments of valid tokens
    rows_E: Tensor  # int64: rows sent to each seat; fewer than the counts where capacity dropped some
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
        plan = make_plan(seats_TK, weights, self.config.num_experts, self.config.capacity_factor)
        announced = announce(plan, self.groups)
        rows = tape.compute(_spread, hidden, plan)  # while the counts travel
        delivery = deliver(plan, announced.wait(), self.groups)
        dispatched = tape.exchange(rows, delivery.splits)
        shared = tape.compute(self.shared, hidden) if self.shared is not None else None
        yield
        rows, span = yield from self._expert_phases(tape, dispatched.wait(), delivery)
        returned = tape.exchange(rows, delivery.splits.reversed())
        yield
        output = tape.compute(_combine, returned.wait(), weights, shared, plan, hidden.shape)
        return output, self._load(routing, weights, plan, auxiliary, span)

    def _load(
        self, routing: Routing, weights_TK: Tensor, plan: Plan, auxiliary: Tensor, span: tuple[Any, Any]
    ) -> LayerLoad:
        gates_E = weights_TK.new_zeros(self.config.num_experts + 1, dtype=torch.float64)
        gates_E.index_add_(0, routing.experts_TK.flatten(), weights_TK.detach().flatten().double())
        return LayerLoad(
            experts_TK=routing.experts_TK,
            counts_E=routing.counts_E,
            rows_E=plan.rows_E,
            gates_E=gates_E[:-1],
            auxiliary_loss=auxiliary.detach(),
            signals=routing.signals,
            span=span,
        )

    def _expert_phases(
        self, tape: Recorder, rows: Tensor, delivery: Delivery
    ) -> Generator[None, None, tuple[Tensor, tuple[Any, Any]]]:
        shared = delivery.shared
        if shared is not None:
            gathered = tape.exchange(tape.compute(_repeat, rows, len(shared.send)), shared)
            yield
            rows = gathered.wait()
        begin = moment(rows.device)
        rows = tape.compute(self._run_experts, rows, delivery)
        span = begin, moment(rows.device)
        if shared is not None:
            summands = tape.exchange(rows, shared.reversed())
            yield
            rows = tape.compute(_add_up, summands.wait(), len(shared.send))
        return rows, span

    def _run_experts(self, rows: Tensor, delivery: Delivery) -> Tensor:
        order_N, slot_N1 = delivery.order_N, delivery.slot_N1
        if order_N is None or slot_N1 is None:
            return self.experts(rows, delivery.counts)
        out = self.experts(take_rows(rows, order_N, slot_N1), delivery.counts)
        return take_rows(out, slot_N1[:, 0], order_N[:, None])


def _spread(hidden: Tensor, plan: Plan) -> Tensor:
    return take_rows(hidden.flatten(0, 1), plan.token_N, plan.slot_TK)


def _repeat(rows: Tensor, times: int) -> Tensor:
    return rows.repeat(times, 1)


def _add_up(rows: Tensor, times: int) -> Tensor:
    return rows.unflatten(0, (times, -1)).sum(0)


def _combine(
    rows: Tensor, weights_TK: Tensor, shared: Tensor | None, plan: Plan, shape: torch.Size
) -> Tensor:
    routed = weighted_sum(rows, weights_TK, plan).view(shape)
    return routed if shared is None else routed + shared
