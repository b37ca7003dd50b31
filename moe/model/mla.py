"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values from one small latent.

Each head's query and key have a part without position and a rotated part; the rotated key is one for
all heads. Queries go through a low-rank latent too when `q_lora_rank` is set.

Heads are cut over `tp`. The products down to the latents are whole on every rank and see only its
stretch of the sequence; what is gathered is the latent, which is small. With `cp` the latents travel
round a ring, not the keys and values made from them, and each rank expands what passes by:
kv_lora_rank + qk_rope_head_dim numbers per token instead of (qk_head_dim + v_head_dim) x heads.
Legend: B sequences, S positions (of this context-parallel rank), s positions (of this rank), D hidden
size, H heads of this rank.
"""

from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention import attend, merge, partial_attention
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation, softmax_scale
from parallel.collectives import (
    ALONE,
    Group,
    ModelGroups,
    Splits,
    gather_sequence,
    group_rank,
    group_size,
    scatter_sum,
)
from parallel.linear import Linear, by_inputs, by_outputs
from parallel.pipeline.tape import Recorder
from parallel.sequence import Positions

LATENT_EPS = 1e-6  # of the latents' norms: the release does not read it from its configuration


class LatentQuery(nn.Module):
    """Queries through a normalised latent of `q_lora_rank`."""

    def __init__(self, config: ModelConfig, rank: int, groups: ModelGroups, dtype: torch.dtype) -> None:
        super().__init__()
        self.group = groups.tp
        self.down = Linear(config.hidden_size, rank, dtype)
        self.norm = RMSNorm(rank, LATENT_EPS, dtype)
        self.up = Linear(rank, config.num_heads * config.qk_head_dim, dtype, by_outputs(groups.tp))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, s, D] -> [B, S, H x qk_head_dim]."""
        return self.up(gather_sequence(self.norm(self.down(hidden)), self.group))


class FullQuery(Linear):
    """Queries by one product, as in V2-Lite."""

    def __init__(self, config: ModelConfig, groups: ModelGroups, dtype: torch.dtype) -> None:
        width = config.num_heads * config.qk_head_dim
        super().__init__(config.hidden_size, width, dtype, by_outputs(groups.tp))
        self.group = groups.tp

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, s, D] -> [B, S, H x qk_head_dim]."""
        return super().forward(gather_sequence(hidden, self.group))


class MultiHeadLatentAttention(nn.Module):
    """Causal attention of one layer."""

    def __init__(
        self, config: ModelConfig, groups: ModelGroups = ALONE, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        heads, latent = config.num_heads, config.kv_lora_rank
        self.scale = softmax_scale(config.rope, config.qk_head_dim)
        self.query: nn.Module
        if config.q_lora_rank is None:
            self.query = FullQuery(config, groups, dtype)
        else:
            self.query = LatentQuery(config, config.q_lora_rank, groups, dtype)
        self.kv_down = Linear(config.hidden_size, latent + config.qk_rope_head_dim, dtype)
        self.kv_norm = RMSNorm(latent, LATENT_EPS, dtype)
        key_value = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_up = Linear(latent, key_value, dtype, by_outputs(groups.tp))
        self.out = Linear(heads * config.v_head_dim, config.hidden_size, dtype, by_inputs(groups.tp))

    def forward(self, hidden: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """[B, s, D] -> [B, s, D]. `mask` [B, 1, S, S]: where a query may look; None is causal."""
        query, latent = self._project(hidden, rotation)
        return self._leave(attend(query, *self._expand(latent), self.scale, mask))

    def ring_phases(
        self,
        tape: Recorder,
        hidden: Tensor,
        rotation: Rotation,
        positions: Positions,
        documents: Tensor | None,
    ) -> Generator[None, None, Tensor]:
        """The same over `cp`: every rank's latents pass by once. `documents` [B, S of all ranks]."""
        query, passing = tape.compute(self._ring_project, hidden, rotation)
        ring, partials = _to_next_rank(passing.shape[0], self.groups.cp), []
        for turn in range(positions.cp):
            source = (positions.cp_rank - turn) % positions.cp
            arriving = tape.exchange(passing, ring) if turn + 1 < positions.cp else None
            seen = replace(positions, cp_rank=source)
            partials += tape.compute(self._partial, query, passing, positions, seen, documents)
            if arriving is not None:
                yield
                passing = arriving.wait()
        return tape.compute(self._merge, *partials)

    def _partial(
        self, query: Tensor, rows: Tensor, ours: Positions, theirs: Positions, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of our queries to the latents that passed by."""
        sight = ours.sight(theirs.cp_rank)
        latent = rows.unflatten(0, (query.shape[0], -1))[:, sight.keys]
        numbers = None
        if documents is not None:
            of_queries, of_keys = ours.context(documents), theirs.context(documents)
            numbers = of_queries[:, sight.queries], of_keys[:, sight.keys]
        key, value = self._expand(latent)
        return partial_attention(
            query[:, sight.queries], key, value, self.scale, causal=sight.causal, documents=numbers
        )

    def _merge(self, *partials: Tensor) -> Tensor:
        return self._leave(merge(*partials))

    def _ring_project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        query, latent = self._project(hidden, rotation)
        return query, latent.flatten(0, 1)

    def _project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, S, H, qk_head_dim]; latents [B, S, kv_lora_rank + qk_rope_head_dim]."""
        config = self.config
        query = self.query(hidden).unflatten(-1, (-1, config.qk_head_dim))
        plain, rotated = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        query = torch.cat((plain, rotation.apply(rotated)), -1)
        latent, key = self.kv_down(hidden).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        gathered = gather_sequence(torch.cat((self.kv_norm(latent), key), -1), self.groups.tp)
        latent, key = gathered.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        return query, torch.cat((latent, rotation.apply(key[:, :, None])[:, :, 0]), -1)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, S, H, qk_head_dim] and values [B, S, H, v_head_dim] of latents."""
        config = self.config
        latent, shared_key = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        key_value = self.kv_up(latent).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        key, value = key_value.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        shared_key = shared_key[:, :, None].expand(-1, -1, key.shape[2], -1)
        return torch.cat((key, shared_key), -1), value

    def _leave(self, mixed: Tensor) -> Tensor:
        return scatter_sum(self.out(mixed.flatten(-2)), self.groups.tp)


def _to_next_rank(rows: int, group: Group) -> Splits:
    ranks, rank = group_size(group), group_rank(group)
    send = tuple(rows if other == (rank + 1) % ranks else 0 for other in range(ranks))
    receive = tuple(rows if other == (rank - 1) % ranks else 0 for other in range(ranks))
    return Splits(send, receive, group)


def document_mask(documents: Tensor) -> Tensor:
    """Causal attention inside each document: [B, S] document numbers -> [B, 1, S, S], true where allowed."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
