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

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention_layer import AttentionLayer
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from parallel.collectives import ALONE, ModelGroups, gather_sequence
from parallel.linear import Linear, by_inputs, by_outputs

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


class MultiHeadLatentAttention(AttentionLayer):
    """Causal attention of one layer over latents."""

    def __init__(
        self, config: ModelConfig, groups: ModelGroups = ALONE, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, groups)
        heads, latent = config.num_heads, config.kv_lora_rank
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
