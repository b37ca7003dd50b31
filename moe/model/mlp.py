"""SwiGLU: down(silu(gate(x)) * up(x)). Gate and up are one product, gate rows first."""

import torch
from torch import Tensor, nn

from parallel.activation import TILED, Activation, swiglu
from parallel.collectives import Group, gather_sequence, scatter_sum
from parallel.linear import Linear, by_inputs, by_outputs


class SwiGLU(nn.Module):
    """A dense MLP of width F, cut over `group`; also used for all shared experts together."""

    def __init__(
        self, hidden_size: int, width: int, group: Group = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.group = group
        self.activation: Activation = TILED
        self.gate_up = Linear(hidden_size, 2 * width, dtype, by_outputs(group, sections=2))
        self.down = Linear(width, hidden_size, dtype, by_inputs(group))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, s, D] -> [B, s, D], this rank's stretch of the sequence."""
        whole = gather_sequence(hidden, self.group)
        return scatter_sum(self.down(swiglu(self.gate_up(whole), by=self.activation)), self.group)
