"""One transformer layer: h + attention(norm(h)), then h + mlp(norm(h)), the MLP dense or of experts.

Legend: B sequences, S positions, D hidden size.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.layer import LayerLoad, MoELayer
from moe.model.mla import MultiHeadLatentAttention
from moe.model.mlp import SwiGLU
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from parallel.collectives import Group
from parallel.pipeline.tape import Recorder


@dataclass(frozen=True)
class Surroundings:
    """What every layer sees of a microbatch: positions, who may look where, padding, its weight."""

    rotation: Rotation
    mask: Tensor | None  # [B, 1, S, S]; None is causal
    valid: Tensor  # [B, S]
    auxiliary_share: float


class Block(nn.Module):
    """A dense layer, or with `is_moe` a layer of experts cut over `group`."""

    def __init__(
        self, config: ModelConfig, balance: BalanceConfig, *, is_moe: bool, group: Group, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = MultiHeadLatentAttention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.moe = MoELayer(config, balance, group, dtype, seed=None) if is_moe else None
        self.mlp = None if is_moe else SwiGLU(config.hidden_size, config.intermediate_size, dtype)

    def phases(
        self, tape: Recorder, hidden: Tensor, around: Surroundings
    ) -> Generator[None, None, tuple[Tensor, LayerLoad | None]]:
        """[B, S, D] -> [B, S, D] and the load of the experts, if any."""
        if self.moe is None:
            return tape.compute(self._dense, hidden, around), None
        residual, normed = tape.compute(self._attend, hidden, around)
        output, load = yield from self.moe.phases(tape, normed, around.valid, around.auxiliary_share)
        return tape.compute(torch.add, residual, output), load

    def _attend(self, hidden: Tensor, around: Surroundings) -> tuple[Tensor, Tensor]:
        hidden = hidden + self.attention(self.attention_norm(hidden), around.rotation, around.mask)
        return hidden, self.mlp_norm(hidden)

    def _dense(self, hidden: Tensor, around: Surroundings) -> Tensor:
        assert self.mlp is not None
        residual, normed = self._attend(hidden, around)
        return residual + self.mlp(normed)
