"""The routed experts that live on this rank: SwiGLU over rows in expert order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.mlp import swiglu
from parallel.collectives import ModelGroups, group_rank, group_size
from parallel.linear import GroupedLinear, by_inputs, by_outputs


class Experts(nn.Module):
    """This rank's experts, whole or with `etp` a part of the width of each."""

    def __init__(self, config: ModelConfig, groups: ModelGroups, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        num_local = config.num_experts // group_size(groups.ep)
        first = group_rank(groups.ep) * num_local
        halves = by_outputs(groups.etp, sections=2)
        self.gate_up = GroupedLinear(num_local, first, hidden, 2 * width, dtype, halves)
        self.down = GroupedLinear(num_local, first, width, hidden, dtype, by_inputs(groups.etp))

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows [N, D], `counts[i]` of them for local expert i, in that order -> [N, D].

        With `etp` the result is this rank's part of a sum.
        """
        return self.down(swiglu(self.gate_up(rows, counts)), counts)
