"""The routed experts that live on this rank: SwiGLU over rows in expert order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.mlp import swiglu
from parallel.linear import GroupedLinear


class Experts(nn.Module):
    """Experts `first` .. `first + num_local - 1`."""

    def __init__(
        self, config: ModelConfig, num_local: int, first: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up = GroupedLinear(num_local, first, hidden, 2 * width, dtype)
        self.down = GroupedLinear(num_local, first, width, hidden, dtype)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows [N, D], `counts[i]` of them for local expert i, in that order -> [N, D]."""
        return self.down(swiglu(self.gate_up(rows, counts)), counts)
