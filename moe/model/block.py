"""One transformer layer: h + attention(norm(h)), then h + mlp(norm(h)), the MLP dense or of experts.

Legend: B sequences, S positions, s positions of this rank, D hidden size.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.attention_layer import AttentionLayer
from moe.model.experts import Placement
from moe.model.gqa import GroupedQueryAttention
from moe.model.layer import LayerLoad, MoELayer
from moe.model.mla import MultiHeadLatentAttention
from moe.model.mlp import SwiGLU
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from parallel.collectives import ModelGroups
from parallel.pipeline.tape import Recorder
from parallel.sequence import Positions


@dataclass(frozen=True)
class Surroundings:
    """What every layer sees of a microbatch: positions, who may look where, padding, its weight."""

    positions: Positions
    rotation: Rotation  # of this context-parallel rank's positions
    mask: Tensor | None  # [B, 1, S, S] without context parallelism; None is causal
    documents: Tensor | None  # [B, S] of whole sequences
    valid: Tensor  # [B, s]: of this rank's stretch
    auxiliary_share: float


class Block(nn.Module):
    """A dense layer, or with `is_moe` a layer of experts."""

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig,
        groups: ModelGroups,
        dtype: torch.dtype,
        *,
        is_moe: bool,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        attention = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.attention: AttentionLayer = attention(config, groups, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.moe = (
            MoELayer(config, balance, groups, dtype, seed=None, placement=placement) if is_moe else None
        )
        self.mlp = None if is_moe else SwiGLU(config.hidden_size, config.intermediate_size, groups.tp, dtype)

    def phases(
        self, tape: Recorder, hidden: Tensor, around: Surroundings
    ) -> Generator[None, None, tuple[Tensor, LayerLoad | None]]:
        """[B, s, D] -> [B, s, D] and the load of the experts, if any."""
        residual, normed = yield from self._attention_phases(tape, hidden, around)
        if self.moe is None:
            return tape.compute(self._dense, residual, normed), None
        output, load = yield from self.moe.phases(tape, normed, around.valid, around.auxiliary_share)
        return tape.compute(torch.add, residual, output), load

    def _attention_phases(
        self, tape: Recorder, hidden: Tensor, around: Surroundings
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """The residual stream after attention, and normed for what comes next."""
        if around.positions.cp == 1:
            return tape.compute(self._attend, hidden, around)
        normed = tape.compute(self.attention_norm, hidden)
        attended = yield from self.attention.ring_phases(
            tape, normed, around.rotation, around.positions, around.documents
        )
        return tape.compute(self._add_and_norm, hidden, attended)

    def _attend(self, hidden: Tensor, around: Surroundings) -> tuple[Tensor, Tensor]:
        attended = self.attention(self.attention_norm(hidden), around.rotation, around.mask)
        return self._add_and_norm(hidden, attended)

    def _add_and_norm(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + attended
        return hidden, self.mlp_norm(hidden)

    def _dense(self, residual: Tensor, normed: Tensor) -> Tensor:
        assert self.mlp is not None
        return residual + self.mlp(normed)
