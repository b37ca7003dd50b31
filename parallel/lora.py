"""Low-rank adapters (2106.09685): beside a frozen weight W [O, I] a trained one of rank r, scale x up x down.

`down` is [r, I] and `up` [O, r]; a stack of experts has a pair for each expert. Both are layers of
linear.py, cut as W is: by outputs `up` is cut alike and `down` is whole, by inputs it is the other way
round. Either way an adapter's outputs are parts of W's outputs, or summands where W's are, so what moves
around a layer does not change. The gradient of the whole one is this rank's summand even where every rank
has the same inputs: it is to be summed over the ranks that hold the parts, too (moe/train/units.py).
Legend: N rows, I inputs, O outputs, r rank.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from parallel.linear import WHOLE, GroupedLinear, Linear


class Lora(nn.Module):
    """What is added to the outputs of a layer with the same inputs."""

    def __init__(self, down: nn.Module, up: nn.Module, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = down, up, scale

    def forward(self, rows: Tensor, *counts: Sequence[int]) -> Tensor:
        """[..., I] -> [..., O]; rows of experts [N, I] come with their counts, as in `GroupedLinear`."""
        added: Tensor = self.up(self.down(rows, *counts) * self.scale, *counts)
        return added


def attach(layer: Linear | GroupedLinear, rank: int, scale: float) -> None:
    """Give a layer an adapter of its dtype, uninitialised; its own weight is frozen."""
    dtype, cut = layer.weight.dtype, layer.cut
    down_cut, up_cut = (WHOLE, cut) if cut.dim == 0 else (cut, WHOLE)
    down: nn.Module
    up: nn.Module
    if isinstance(layer, GroupedLinear):
        down = GroupedLinear(layer.experts, layer.num_inputs, rank, dtype, down_cut)
        up = GroupedLinear(layer.experts, rank, layer.num_outputs, dtype, up_cut)
    else:
        down = Linear(layer.num_inputs, rank, dtype, down_cut)
        up = Linear(rank, layer.num_outputs, dtype, up_cut)
    layer.weight.requires_grad_(False)
    layer.lora = Lora(down, up, scale)
