"""The FP8 guard: how far a layer's products are from those of bf16, on a batch that both compute.

One microbatch runs forward once more without gradients. Every FP8 product is made in bf16 as well, from the
same inputs, and the pass goes on with bf16's: so errors do not add up over layers, and no token is routed
elsewhere. What is told of a layer is the greatest |fp8 - bf16| / |bf16| (2-norms) of its products on any
rank; random numbers give about 0.037, whatever the shape. A sum of parts over ranks is compared part by part.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.model.transformer import Transformer
from parallel.collectives import Group, all_reduce
from parallel.linear import GroupedLinear, Linear, Products, grouped_linear, linear


class _Compared:
    """Products in bf16, and the greatest error of those in FP8 beside them."""

    def __init__(self, in_fp8: Products, greatest: Tensor) -> None:
        self._in_fp8, self._greatest = in_fp8, greatest

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """As `Products` says."""
        return self._compare(linear(rows, weight), self._in_fp8.linear(rows, weight))

    def grouped_linear(self, rows: Tensor, counts: Sequence[int], *stacks: Tensor) -> Tensor:
        """As `Products` says."""
        made = self._in_fp8.grouped_linear(rows, counts, *stacks)
        return self._compare(grouped_linear(rows, counts, *stacks), made)

    def _compare(self, expected: Tensor, found: Tensor) -> Tensor:
        wide = expected.float()
        least = torch.finfo(wide.dtype).tiny  # an expert without rows: 0 / 0
        error = (found.float() - wide).norm() / wide.norm().clamp_min(least)
        self._greatest.copy_(torch.maximum(self._greatest, error))
        return expected


def fp8_errors(model: Transformer, forward: Callable[[], object], world: Group) -> dict[str, float]:
    """The error of every layer of the whole model ("3", "mtp0"); infinite where it is no number.

    `forward` runs a microbatch through the model, without gradients. Every rank must call.
    """
    config = model.config
    names = [str(layer) for layer in range(config.num_layers)]
    names += [f"mtp{index}" for index in range(config.num_mtp_layers)]
    greatest = torch.zeros(len(names), device=next(model.parameters()).device)
    before = []
    try:
        for name, layer in _products_of(model):
            if layer.fp8 is not None:
                before.append((layer, layer.fp8))
                layer.fp8 = _Compared(layer.fp8, greatest[names.index(name)])
        forward()
    finally:
        for layer, in_fp8 in before:
            layer.fp8 = in_fp8
    told = greatest.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return dict(zip(names, all_reduce(told, world, op=dist.ReduceOp.MAX).tolist(), strict=True))


def _products_of(model: Transformer) -> Iterator[tuple[str, Linear | GroupedLinear]]:
    blocks: list[tuple[str, nn.Module]] = list(model.layers.items())
    blocks += [(f"mtp{index}", module) for index, module in enumerate(model.mtp)]
    for name, block in blocks:
        yield from ((name, each) for each in block.modules() if isinstance(each, Linear | GroupedLinear))
