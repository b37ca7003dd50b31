"""SwiGLU: down(silu(gate(x)) * up(x)). Gate and up are one product, gate rows first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.linear import Linear


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F], gate then up, -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """A dense MLP of width F, also used for all shared experts together."""

    def __init__(self, hidden_size: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width, dtype)
        self.down = Linear(width, hidden_size, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(swiglu(self.gate_up(hidden)))
