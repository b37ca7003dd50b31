"""The routed experts that live on this rank: SwiGLU over rows in their order; and which live where."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from parallel.activation import TILED, Activation, swiglu
from parallel.collectives import ModelGroups, group_rank, group_size
from parallel.grouped import Order, gated_experts, sum_rows, take_rows
from parallel.linear import GroupedLinear, by_inputs, by_outputs


@dataclass(frozen=True)
class Placement:
    """Which expert of a layer has which seat: the first E / ep seats are on the first rank, and so on.

    `chosen`: the experts that alone are trained, the last ones of their rank; None makes no difference
    between experts. Nothing outside the layer knows of seats: counts, biases, names and checkpoints go by
    an expert's number.
    """

    order: tuple[int, ...]  # the expert in each seat
    chosen: frozenset[int] | None = None

    @cached_property
    def seats(self) -> tuple[int, ...]:
        """The seat of each expert."""
        assert sorted(self.order) == list(range(len(self.order))), f"{self.order} is no permutation"
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def held(self, ep: int, rank: int) -> tuple[tuple[int, ...], int]:
        """The experts of a rank in the order of their seats, and how many of them, the last, are chosen."""
        num_local = len(self.order) // ep
        mine = self.order[rank * num_local : (rank + 1) * num_local]
        chosen = [expert in (self.chosen or ()) for expert in mine]
        assert sorted(chosen) == chosen, f"chosen experts must have the last seats of {mine}"
        return mine, sum(chosen)


def in_order(num_experts: int) -> Placement:
    """Every expert in the seat of its number."""
    return Placement(tuple(range(num_experts)))


class Experts(nn.Module):
    """This rank's experts, whole or with `etp` a part of the width of each."""

    def __init__(
        self,
        config: ModelConfig,
        groups: ModelGroups,
        dtype: torch.dtype,
        placement: Placement,
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        held, num_chosen = placement.held(group_size(groups.ep), group_rank(groups.ep))
        halves, inputs = by_outputs(groups.etp, sections=2), by_inputs(groups.etp)
        self.activation: Activation = TILED
        self.gate_up = GroupedLinear(held, hidden, 2 * width, dtype, halves, num_chosen=num_chosen)
        self.down = GroupedLinear(held, width, hidden, dtype, inputs, num_chosen=num_chosen)

    def forward(self, source: Tensor, weights_N: Tensor, order: Order, counts: Sequence[int]) -> Tensor:
        """Rows [S, D] -> [S, D], each the sum of what its experts make of it, weighed.

        `order` tells which rows in expert order are copies of which, `counts[i]` of them for local expert
        i; their weights [N] are in fp32. With `etp` the result is this rank's part of a sum.
        """
        gate_up, down = self.gate_up, self.down
        if gate_up.lora is None and down.lora is None and gate_up.fp8 is None:
            stacks = gate_up.stacks, down.stacks
            if source.is_cuda:
                from parallel.grouped_cuda import gated_experts as gated_on_cuda  # needs Triton

                return gated_on_cuda(source, weights_N, order, counts, *stacks)
            return gated_experts(source, weights_N, order, counts, *stacks, self.activation)
        rows = take_rows(source, order)
        return sum_rows(down(swiglu(gate_up(rows, counts), weights_N, self.activation), counts), order)
