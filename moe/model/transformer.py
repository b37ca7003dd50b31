"""The whole model, DeepSeek-V2 and V3 shaped: embedding, blocks, norm, head, and MTP modules.

`phases` runs one microbatch from tokens to losses as a generator; `forward` gives logits through
ordinary autograd.
Legend: B sequences, S positions, D hidden size, V vocabulary.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.block import Block, Surroundings
from moe.model.init import init_weights
from moe.model.layer import LayerLoad
from moe.model.mla import document_mask
from moe.model.mtp import IGNORE, MTPModule, ahead, mtp_targets
from moe.model.norm import RMSNorm
from moe.model.rope import rotation
from moe.model.router import Router
from parallel.collectives import Group
from parallel.linear import linear
from parallel.pipeline.tape import Direct, Recorder, run


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Sequences of one rank, all [B, S]: tokens, labels (IGNORE: none), and which tokens are real.

    With `documents` (numbers within a sequence) attention stays inside a document. The weights turn
    this microbatch's summed losses into its part of the global batch's mean: `loss_weights[0]` for
    the next token, `[k]` for MTP module k, and `auxiliary_share` for the auxiliary losses.
    """

    tokens: Tensor
    labels: Tensor
    valid: Tensor
    documents: Tensor | None = None
    loss_weights: tuple[float, ...] = (1.0,)
    auxiliary_share: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a microbatch gave: token losses [B, S] (0 where nothing is predicted) and expert loads."""

    losses: Tensor
    mtp_losses: tuple[Tensor, ...]
    loads: dict[str, LayerLoad]  # by layer: "3", or "mtp0"


class Transformer(nn.Module):
    """Parameters are whole on every rank but the experts, which are cut over `group`."""

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig | None = None,
        group: Group = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
    ) -> None:
        """With `seed` None the weights are left uninitialised, to be loaded."""
        super().__init__()
        self.config = config
        balance = balance or BalanceConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(config, balance, is_moe=config.is_moe(layer), group=group, dtype=dtype)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        head = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.head = None if config.tie_embeddings else nn.Parameter(head)
        self.mtp = nn.ModuleList(
            MTPModule(config, balance, group, dtype) for _ in range(config.num_mtp_layers)
        )
        if seed is not None:
            init_weights(self, config.init_std, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V]."""
        batch = Microbatch(tokens=tokens, labels=tokens, valid=torch.ones_like(tokens, dtype=torch.bool))
        hidden = run(self._hidden_phases(Direct(), batch, {}))[0]
        return self._logits(hidden)

    def phases(self, tape: Recorder, batch: Microbatch) -> Generator[None, None, Outcome]:
        """Run a microbatch to its losses; they are roots of the tape, weighted as the batch says."""
        loads: dict[str, LayerLoad] = {}
        hidden, around = yield from self._hidden_phases(tape, batch, loads)
        total, losses = tape.compute(self._losses, hidden, batch.labels)
        tape.root(total, batch.loss_weights[0])
        mtp_losses = []
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            valid = ahead(batch.valid, depth, False)
            embedded = tape.compute(self.embedding, ahead(batch.tokens, depth, 0))
            hidden, load = yield from module.phases(tape, hidden, embedded, around, valid)
            labels = mtp_targets(batch.labels, batch.documents, depth)
            total, further = tape.compute(self._normed_losses, module.norm, hidden, labels)
            tape.root(total, batch.loss_weights[depth])
            mtp_losses.append(further)
            assert load is not None
            loads[f"mtp{depth - 1}"] = load
        return Outcome(losses, tuple(mtp_losses), loads)

    def _hidden_phases(
        self, tape: Recorder, batch: Microbatch, loads: dict[str, LayerLoad]
    ) -> Generator[None, None, tuple[Tensor, Surroundings]]:
        """Hidden states [B, S, D] after the final norm."""
        config = self.config
        positions = rotation(config.rope, config.qk_rope_head_dim, batch.tokens.shape[1], batch.tokens.device)
        mask = None if batch.documents is None else document_mask(batch.documents)
        around = Surroundings(positions, mask, batch.valid, batch.auxiliary_share)
        hidden = tape.compute(self.embedding, batch.tokens)
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            hidden, load = yield from block.phases(tape, hidden, around)
            if load is not None:
                loads[str(index)] = load
        return tape.compute(self.norm, hidden), around

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.embedding.weight if self.head is None else self.head)

    def _losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the token losses, in fp32, and the losses [B, S] themselves, detached."""
        logits = self._logits(hidden).float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return losses.sum(), losses.detach().view_as(labels)

    def _normed_losses(self, norm: RMSNorm, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._losses(norm(hidden), labels)

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Every layer of experts by the name its load goes under, with its router."""
        for index, block in enumerate(self.layers):
            if isinstance(block, Block) and block.moe is not None:
                yield str(index), block.moe.router
        for index, module in enumerate(self.mtp):
            if isinstance(module, MTPModule) and module.block.moe is not None:
                yield f"mtp{index}", module.block.moe.router
