"""Reading block-scaled fp8 weights, as DeepSeek-V3 was released (2412.19437, section 3.3).

A weight is stored as e4m3 numbers with one fp32 factor for each block of 128 x 128 of them; the last
blocks of a row or column of blocks may be smaller. Nothing is computed in fp8 here: a weight is read as
the numbers that it stands for.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
FP8 = "F8_E4M3"  # in safetensors


def scales_shape(shape: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """How many blocks a weight of this shape has along each dimension."""
    return tuple(-(-length // BLOCK) for length in shape)


def read_dequantized(weight: Any, scales: Any, place: tuple[slice, ...]) -> Tensor:
    """A rectangle [r, c] of a weight [R, C] in fp32, each number times the factor of its block.

    `weight` and its `scales` [ceil(R / 128), ceil(C / 128)] are tensors, or slices of a file, of which
    only what the rectangle needs is read.
    """
    blocks = tuple(slice(cut.start // BLOCK, -(-cut.stop // BLOCK)) for cut in place)
    factors = scales[blocks].float()
    for dim, (cut, block) in enumerate(zip(place, blocks, strict=True)):
        factors = factors.index_select(dim, torch.arange(cut.start, cut.stop) // BLOCK - block.start)
    return weight[place].float() * factors
