"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values from one small latent.

Each head's query and key have a part without position and a rotated part; the rotated key is one for
all heads. Queries go through a low-rank latent too when `q_lora_rank` is set.
Legend: B sequences, S positions, D hidden size, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation, softmax_scale
from parallel.linear import Linear

LATENT_EPS = 1e-6  # of the latents' norms: the release does not read it from its configuration


class LatentQuery(nn.Module):
    """Queries through a normalised latent of `q_lora_rank`."""

    def __init__(self, config: ModelConfig, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = Linear(config.hidden_size, rank, dtype)
        self.norm = RMSNorm(rank, LATENT_EPS, dtype)
        self.up = Linear(rank, config.num_heads * config.qk_head_dim, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, H x qk_head_dim]."""
        return self.up(self.norm(self.down(hidden)))


class MultiHeadLatentAttention(nn.Module):
    """Causal attention of one layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        heads, latent = config.num_heads, config.kv_lora_rank
        self.query: nn.Module
        if config.q_lora_rank is None:
            self.query = Linear(config.hidden_size, heads * config.qk_head_dim, dtype)
        else:
            self.query = LatentQuery(config, config.q_lora_rank, dtype)
        self.kv_down = Linear(config.hidden_size, latent + config.qk_rope_head_dim, dtype)
        self.kv_norm = RMSNorm(latent, LATENT_EPS, dtype)
        self.kv_up = Linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), dtype)
        self.out = Linear(heads * config.v_head_dim, config.hidden_size, dtype)

    def forward(self, hidden: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]. `mask` [B, 1, S, S]: where a query may look; None is causal."""
        config = self.config
        query = self.query(hidden).unflatten(-1, (config.num_heads, -1))
        query_plain, query_rotated = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, key_rotated = self.kv_down(hidden).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        key_value = self.kv_up(self.kv_norm(latent)).unflatten(-1, (config.num_heads, -1))
        key_plain, value = key_value.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        shared_key = rotation.apply(key_rotated[:, :, None]).expand(-1, -1, config.num_heads, -1)
        query = torch.cat((query_plain, rotation.apply(query_rotated)), -1)
        key = torch.cat((key_plain, shared_key), -1)
        mixed = _attend(query, key, value, softmax_scale(config.rope, config.qk_head_dim), mask)
        return self.out(mixed.flatten(-2))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[B, S, H, *] each -> [B, S, H, v_head_dim]."""
    width = value.shape[-1]
    if width < query.shape[-1]:
        # The flash kernels want one head width; without them the S x S scores would be kept.
        value = F.pad(value, (0, query.shape[-1] - width))
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return mixed.transpose(1, 2)[..., :width]


def document_mask(documents: Tensor) -> Tensor:
    """Causal attention inside each document: [B, S] document numbers -> [B, 1, S, S], true where allowed."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
