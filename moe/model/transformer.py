"""The whole model: embedding, blocks, norm, head, and MTP modules.

A rank may hold several stages of it, as one module whose parameters are each there once. `Stage.phases`
runs one microbatch through one of them, from tokens to losses where that is the whole model, as a
generator; `forward` gives logits through ordinary autograd. `tape.unit` marks where the parameters of a
unit begin to be used.
Legend: B sequences, S positions (of this context-parallel rank), s positions (of this rank), D hidden
size, V vocabulary.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.attention import document_mask
from moe.model.block import Block, Surroundings
from moe.model.experts import Placement
from moe.model.init import init_weights
from moe.model.layer import LayerLoad
from moe.model.mtp import IGNORE, MTPModule, ahead, mtp_targets
from moe.model.norm import RMSNorm
from moe.model.rope import rotation
from moe.model.router import Router
from moe.model.stages import Part, whole
from parallel.collectives import ALONE, ModelGroups, gather_sequence, group_rank, group_size
from parallel.head import head_losses
from parallel.linear import Linear, by_outputs, linear
from parallel.lora import Lora
from parallel.pipeline.tape import Direct, Recorder, run
from parallel.sequence import Positions
from parallel.shards import mark_cut
from parallel.vocab import VocabEmbedding, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Whole sequences, all [B, S]: tokens, labels (IGNORE: none), and which tokens are real.

    Every rank that shares the sequences has them all; the model takes what it computes. Without labels
    it gives logits instead of losses. With `documents` (numbers within a sequence) attention stays
    inside a document. The weights turn this microbatch's summed losses into its part of the global
    batch's mean: `loss_weights[0]` for the next token, `[k]` for MTP module k, and `auxiliary_share` for
    the auxiliary losses.
    """

    tokens: Tensor
    labels: Tensor | None
    valid: Tensor
    documents: Tensor | None = None
    loss_weights: tuple[float, ...] = (1.0,)
    auxiliary_share: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a microbatch gave on this stage: the loads of its experts and, on the last stage, the rest.

    `losses` [B, S] of this context-parallel rank's positions, 0 where nothing is predicted; the same on
    every tensor-parallel rank. `logits` [B, S, V / tp] of them, where there were no labels.
    """

    loads: dict[str, LayerLoad]  # by layer: "3", or "mtp0"
    losses: Tensor | None = None
    mtp_losses: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


class Transformer(nn.Module):
    """Stages of the model, together maybe all of it, cut over the groups."""

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig | None = None,
        groups: ModelGroups = ALONE,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
        parts: Sequence[Part] = (),
        placements: Mapping[str, Placement] | None = None,
    ) -> None:
        """With `seed` None the weights are left uninitialised, to be loaded.

        `parts`: the stages, in order; none stands for all layers as one. `placements`: which experts live
        where, by layer ("3", "mtp0"); where none is given they live in order.
        """
        super().__init__()
        placed = (placements or {}).get
        self.config, self.groups = config, groups
        self.parts = tuple(parts) or (whole(config.num_layers),)
        balance = balance or BalanceConfig()
        has_last = self.parts[-1].last
        width, num_mtp = config.hidden_size, config.num_mtp_layers if has_last else 0
        # By their numbers in the whole model, which are the canonical names.
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(
                    config,
                    balance,
                    groups,
                    dtype,
                    is_moe=config.is_moe(layer),
                    placement=placed(str(layer)),
                )
                for part in self.parts
                for layer in part.layers
            }
        )
        embeds = any(self._embeds(part) for part in self.parts)
        self.embedding = VocabEmbedding(config.vocab_size, width, groups.tp, dtype) if embeds else None
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype) if has_last else None
        self.head = self._make_head(dtype) if has_last and not config.tie_embeddings else None
        self.head_lora: Lora | None = None
        self.mtp = nn.ModuleList(
            MTPModule(config, balance, groups, dtype, placed(f"mtp{index}")) for index in range(num_mtp)
        )
        if seed is not None:
            init_weights(self, config.init_std, seed)

    def _embeds(self, part: Part) -> bool:
        """Whether a stage needs the embedding: for tokens, for MTP modules, or as its head."""
        tied = self.config.tie_embeddings or self.config.num_mtp_layers > 0
        return part.first or (part.last and tied)

    def _make_head(self, dtype: torch.dtype) -> nn.Parameter:
        rows = self.config.vocab_size // group_size(self.groups.tp)
        head = nn.Parameter(torch.empty(rows, self.config.hidden_size, dtype=dtype))
        mark_cut(head, by_outputs(self.groups.tp))
        return head

    def attach_to_head(self, rank: int, scale: float) -> None:
        """Give the head, where this rank holds it, an adapter, uninitialised; the head itself is frozen."""
        if self.head is None:
            return
        self.head.requires_grad_(False)
        down = Linear(self.config.hidden_size, rank, self.head.dtype)
        up = Linear(rank, self.config.vocab_size, self.head.dtype, by_outputs(self.groups.tp))
        self.head_lora = Lora(down, up, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V]. Only where neither sequence nor vocabulary is cut."""
        assert self.groups.tp_cp is None
        batch = Microbatch(tokens=tokens, labels=None, valid=torch.ones_like(tokens, dtype=torch.bool))
        logits = run(self.phases(Direct(), batch))[1].logits
        assert logits is not None
        return logits

    def phases(
        self, tape: Recorder, batch: Microbatch
    ) -> Generator[None, None, tuple[Tensor | None, Outcome]]:
        """Run a microbatch through the whole model, where this is it."""
        (stage,) = self.stages()
        return stage.phases(tape, batch)

    def stages(self) -> list["Stage"]:
        """The stages, to be run one by one."""
        return [Stage(self, part) for part in self.parts]

    def units(self, part: Part) -> Iterator[str]:
        """The units of a stage in the order in which its phases enter them."""
        if self._embeds(part):
            yield "embedding"
        yield from (f"layers.{layer}" for layer in part.layers)
        if part.last:
            yield "head"
            yield from (f"mtp.{index}" for index in range(len(self.mtp)))

    def run_part(
        self, part: Part, tape: Recorder, batch: Microbatch, hidden: Tensor | None
    ) -> Generator[None, None, tuple[Tensor | None, Outcome]]:
        """The phases of a stage (see `Stage`)."""
        around = self._surroundings(batch)
        loads: dict[str, LayerLoad] = {}
        if self._embeds(part):
            tape.unit("embedding")
        if part.first:
            hidden = self._embed(tape, around, batch.tokens)
        assert hidden is not None
        for layer in part.layers:
            tape.unit(f"layers.{layer}")
            block = self.layers[str(layer)]
            assert isinstance(block, Block)
            hidden, load = yield from block.phases(tape, hidden, around)
            if load is not None:
                loads[str(layer)] = load
        if not part.last:
            return hidden, Outcome(loads)
        tape.unit("head")
        assert self.norm is not None
        hidden = tape.compute(self.norm, hidden)
        if batch.labels is None:
            return None, Outcome(loads, logits=tape.compute(self._logits, hidden))
        total, losses = tape.compute(self._losses, hidden, around.positions.context(batch.labels))
        tape.root(total, batch.loss_weights[0])
        mtp_losses = yield from self._mtp_phases(tape, batch, hidden, around, loads)
        return None, Outcome(loads, losses, tuple(mtp_losses))

    def _mtp_phases(
        self,
        tape: Recorder,
        batch: Microbatch,
        hidden: Tensor,
        around: Surroundings,
        loads: dict[str, LayerLoad],
    ) -> Generator[None, None, list[Tensor]]:
        found = []
        assert batch.labels is not None
        for depth, module in enumerate(self.mtp, start=1):
            tape.unit(f"mtp.{depth - 1}")
            assert isinstance(module, MTPModule)
            valid = around.positions.sequence(ahead(batch.valid, depth, False))
            embedded = self._embed(tape, around, ahead(batch.tokens, depth, 0))
            hidden, load = yield from module.phases(tape, hidden, embedded, around, valid)
            labels = around.positions.context(mtp_targets(batch.labels, batch.documents, depth))
            total, losses = tape.compute(self._normed_losses, module.norm, hidden, labels)
            tape.root(total, batch.loss_weights[depth])
            found.append(losses)
            assert load is not None
            loads[f"mtp{depth - 1}"] = load
        return found

    def _surroundings(self, batch: Microbatch) -> Surroundings:
        config, tokens = self.config, batch.tokens
        positions = positions_of(tokens.shape[1], self.groups)
        turned = rotation(config.rope, config.rotated_dims, positions.numbers(), tokens.device)
        masked = batch.documents is not None and positions.cp == 1
        return Surroundings(
            positions=positions,
            rotation=turned,
            mask=document_mask(batch.documents) if masked and batch.documents is not None else None,
            documents=batch.documents,
            valid=positions.sequence(batch.valid),
            auxiliary_share=batch.auxiliary_share,
        )

    def _embed(self, tape: Recorder, around: Surroundings, tokens: Tensor) -> Tensor:
        embedded: Tensor = tape.compute(self._look_up, around.positions.context(tokens))
        return embedded

    def _look_up(self, tokens: Tensor) -> Tensor:
        """Hidden states that always ask for a gradient.

        Ranks that train different parts must still make the same exchanges on the way back.
        """
        assert self.embedding is not None
        hidden: Tensor = self.embedding(tokens)
        return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.requires_grad_()

    def _logits(self, hidden: Tensor) -> Tensor:
        """[B, s, D] -> [B, S, V / tp], this rank's part of the vocabulary."""
        rows = gather_sequence(hidden, self.groups.tp)
        logits = linear(rows, self._head_weight())
        return logits if self.head_lora is None else logits + self.head_lora(rows)

    def _head_weight(self) -> Tensor:
        if self.head is not None:
            return self.head
        assert self.embedding is not None
        return self.embedding.weight

    def _losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the token losses, in fp32, and the losses [B, S] themselves, detached."""
        if self.head_lora is None:
            rows = gather_sequence(hidden, self.groups.tp)
            losses = head_losses(rows, self._head_weight(), labels, IGNORE, self.groups.tp)
        else:
            losses = cross_entropy(self._logits(hidden).float(), labels, IGNORE, self.groups.tp)
        return losses.sum(), losses.detach()

    def _normed_losses(self, norm: RMSNorm, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._losses(norm(hidden), labels)

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Every layer of experts of this stage by the name its load goes under, with its router."""
        for name, block in self.layers.items():
            if isinstance(block, Block) and block.moe is not None:
                yield name, block.moe.router
        for index, module in enumerate(self.mtp):
            if isinstance(module, MTPModule) and module.block.moe is not None:
                yield f"mtp{index}", module.block.moe.router


@dataclass(frozen=True)
class Stage:
    """One stage of a model."""

    model: Transformer
    part: Part

    def phases(
        self, tape: Recorder, batch: Microbatch, hidden: Tensor | None = None
    ) -> Generator[None, None, tuple[Tensor | None, Outcome]]:
        """Run a microbatch through the stage: hidden states [B, s, D] in, except on the first, and out.

        On the last stage nothing goes out, and the losses are roots of the tape, weighted as the batch
        says.
        """
        return self.model.run_part(self.part, tape, batch, hidden)


def expert_layers(config: ModelConfig) -> list[str]:
    """The names that loads of the whole model's layers go under, in order."""
    layers = [str(layer) for layer in range(config.num_layers) if config.is_moe(layer)]
    return layers + [f"mtp{index}" for index in range(config.num_mtp_layers)]


def positions_of(length: int, groups: ModelGroups) -> Positions:
    """Which positions of a sequence this rank holds."""
    return Positions(
        length=length,
        cp=group_size(groups.cp),
        cp_rank=group_rank(groups.cp),
        tp=group_size(groups.tp),
        tp_rank=group_rank(groups.tp),
    )
