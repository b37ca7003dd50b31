"""Grouped-query attention (2305.13245): keys and values of few heads, each shared by a group of queries.

Mixtral's, Qwen3-MoE's and OLMoE's attention. Queries and keys may be normalised before they are turned:
each head by itself (Qwen3), or all heads of a token together (OLMoE).

Heads are cut over `tp`, those of keys and values as well; with `cp` the keys and values themselves
travel round the ring, before they are repeated for the queries of their group.
Legend: B sequences, S positions (of this context-parallel rank), s positions (of this rank), D hidden
size, H heads of this rank, G heads of this rank with keys and values of their own, W width of a head.
"""

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.model.attention_layer import AttentionLayer
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from parallel.collectives import ALONE, ModelGroups, gather_sequence, group_size
from parallel.linear import Linear, by_inputs, by_outputs


class GroupedQueryAttention(AttentionLayer):
    """Causal attention of one layer over heads that groups of queries share."""

    def __init__(
        self, config: ModelConfig, groups: ModelGroups = ALONE, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, groups)
        ranks = group_size(groups.tp)
        assert config.kv_heads % ranks == 0, f"{ranks} ranks cannot share {config.kv_heads} heads of keys"
        assert ranks == 1 or config.qk_norm != "full", "no rank holds all heads to normalise together"
        hidden, width, cut = config.hidden_size, config.qk_head_dim, by_outputs(groups.tp)
        queries, keys = config.num_heads * width, config.kv_heads * width
        self.query = Linear(hidden, queries, dtype, cut)
        self.key = Linear(hidden, keys, dtype, cut)
        self.value = Linear(hidden, keys, dtype, cut)
        self.query_norm, self.key_norm = (
            _make_norm(config, all_heads, dtype) for all_heads in (queries, keys)
        )
        self.out = Linear(queries, hidden, dtype, by_inputs(groups.tp))

    def _project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, S, H, W]; keys, rotated too, and values side by side [B, S, 2 x G x W]."""
        whole = gather_sequence(hidden, self.groups.tp)
        query = rotation.apply(self._normed(self.query_norm, self.query(whole)))
        key = rotation.apply(self._normed(self.key_norm, self.key(whole)))
        return query, torch.cat((key.flatten(-2), self.value(whole)), -1)

    def _normed(self, norm: RMSNorm | None, heads: Tensor) -> Tensor:
        """[B, S, H x W] -> [B, S, H, W], normalised if at all."""
        if norm is not None and self.config.qk_norm == "full":
            heads = norm(heads)
        heads = heads.unflatten(-1, (-1, self.config.qk_head_dim))
        return norm(heads) if norm is not None and self.config.qk_norm == "head" else heads

    def _expand(self, passing: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, H, W], those of a group of queries repeated for each of it."""
        config = self.config
        group = config.num_heads // config.kv_heads
        pair = passing.unflatten(-1, (2, -1, 1, config.qk_head_dim)).expand(-1, -1, -1, -1, group, -1)
        key, value = pair.flatten(3, 4).unbind(2)
        return key, value


def _make_norm(config: ModelConfig, all_heads: int, dtype: torch.dtype) -> RMSNorm | None:
    if config.qk_norm == "none":
        return None
    return RMSNorm(config.qk_head_dim if config.qk_norm == "head" else all_heads, config.rms_norm_eps, dtype)
