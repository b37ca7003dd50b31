"""Multi-token prediction (DeepSeek-V3, section 2.2): one more block predicts one token further.

Module k joins the hidden state of position i with the embedding of token i + k and predicts token
i + k + 1 through the main model's head. As in the released weights the embedding's half comes
first, and module 1 reads the main model's hidden states after its final norm.
Legend: B sequences, S positions, D hidden size.
"""

from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.block import Block, Surroundings
from moe.model.experts import Placement
from moe.model.layer import LayerLoad
from moe.model.norm import RMSNorm
from parallel.collectives import ModelGroups
from parallel.linear import Linear
from parallel.pipeline.tape import Recorder

IGNORE = -100  # a label that is not predicted


class MTPModule(nn.Module):
    """Embedding and head are the main model's."""

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig,
        groups: ModelGroups,
        dtype: torch.dtype,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size, dtype)
        self.block = Block(config, balance, groups, dtype, is_moe=True, placement=placement)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def phases(
        self, tape: Recorder, hidden: Tensor, embedded: Tensor, around: Surroundings, valid: Tensor
    ) -> Generator[None, None, tuple[Tensor, LayerLoad | None]]:
        """Hidden states and embeddings of the tokens ahead, [B, S, D] each -> [B, S, D] and the load.

        `valid` [B, S] is true where the token ahead is a real one.
        """
        joined = tape.compute(self._join, hidden, embedded)
        return (yield from self.block.phases(tape, joined, replace(around, valid=valid)))

    def _join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        return self.projection(torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), -1))


def mtp_targets(labels: Tensor, documents: Tensor | None, depth: int) -> Tensor:
    """Labels [B, S] of module `depth`; IGNORE where it has none, or would have to cross into a document."""
    targets = ahead(labels, depth, IGNORE)
    if documents is None:
        return targets
    return targets.masked_fill(ahead(documents, depth, -1) != documents, IGNORE)


def ahead(values: Tensor, steps: int, fill: int | bool) -> Tensor:
    """[B, S] shifted so that position i holds what stood at i + steps; `fill` at the end."""
    return torch.cat((values[:, steps:], torch.full_like(values[:, :steps], fill)), dim=1)
