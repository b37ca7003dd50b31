"""Rotary position embedding: plain, NTK-aware and YaRN, as DeepSeek-V2 and V3 released them.

Pairs of dimensions are turned: (2i, 2i + 1), the order of DeepSeek's released weights, or (i, i + R/2),
that of Llama's and of all who follow it. YaRN
(arXiv 2309.00071) blends interpolated and original frequencies; DeepSeek scales the softmax by
mscale(factor, mscale_all_dim)^2 and the rotation by mscale(factor, mscale) / mscale(factor, mscale_all_dim).
Legend: S positions, R rotated dimensions.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.config import RopeConfig


@dataclass(frozen=True)
class Rotation:
    """cos and sin [S, R/2] in fp32 of every position's angles, and which dimensions are pairs."""

    cos: Tensor
    sin: Tensor
    pairs: Literal["interleaved", "halves"] = "interleaved"

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate [B, S, heads, R]; the dtype stays."""
        shape, dim = ((-1, 2), -1) if self.pairs == "interleaved" else ((2, -1), -2)
        first, second = heads.float().unflatten(-1, shape).unbind(dim)
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim)
        return turned.flatten(-2).to(heads.dtype)


def rotation(rope: RopeConfig, num_dims: int, positions: Tensor, device: torch.device) -> Rotation:
    """The rotation of positions [S], numbered from 0."""
    angles = torch.outer(positions.float(), frequencies(rope, num_dims))
    scale = rotation_scale(rope)
    return Rotation((angles.cos() * scale).to(device), (angles.sin() * scale).to(device), rope.pairs)


def frequencies(rope: RopeConfig, num_dims: int) -> Tensor:
    """Angle per position of each rotated pair, [R/2] in fp32."""
    exponent = torch.arange(0, num_dims, 2, dtype=torch.float32) / num_dims
    if rope.kind == "ntk":
        return 1.0 / (rope.theta * rope.factor ** (num_dims / (num_dims - 2))) ** exponent
    original = 1.0 / rope.theta**exponent
    if rope.kind == "plain":
        return original
    low = max(math.floor(_pair_turning(rope, num_dims, rope.beta_fast)), 0)
    high = min(math.ceil(_pair_turning(rope, num_dims, rope.beta_slow)), num_dims - 1)
    span = max(high - low, 0.001)
    interpolated = ((torch.arange(num_dims // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return original / rope.factor * interpolated + original * (1 - interpolated)


def _pair_turning(rope: RopeConfig, num_dims: int, turns: float) -> float:
    """Index of the pair that turns this often over the original context."""
    return num_dims * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotation_scale(rope: RopeConfig) -> float:
    """Factor on cos and sin; 1 when both mscales are equal, as in every released model."""
    if rope.kind != "yarn":
        return 1.0
    return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)


def softmax_scale(rope: RopeConfig, qk_head_dim: int) -> float:
    """Factor on attention scores: head_dim^-0.5, times mscale^2 under YaRN with `mscale_all_dim`."""
    scale = qk_head_dim**-0.5
    if rope.kind == "yarn" and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale
