"""What a rank holds all the time, to the byte: the model on the meta device, laid out by ZeRO.

Nothing is reckoned beside the code that trains: the model is built over groups that are imagined, its
parameters are shared out by `parameter_units`, and the flat buffers are those of parallel/zero.py.
"""

from dataclasses import dataclass

import torch

from moe.config import RunConfig
from moe.train.optim import DTYPES
from moe.train.step import build_model
from moe.train.tuning import shape
from moe.train.units import parameter_units
from parallel.collectives import group_size
from parallel.groups import imagine
from parallel.layout import Layout
from parallel.zero import flat_buffers

_GRADIENT, _MASTER, _COUNTER = 4, 4, 4  # bytes of fp32; of every owned stretch Adam counts the steps


@dataclass(frozen=True, kw_only=True)
class Static:
    """Bytes of one rank. Weights include what is frozen and the routers' buffers; all include padding.

    `travelling`: copies of gradients that are summed in another precision than they are kept in.
    """

    weights: int
    gradients: int
    optimizer: int
    travelling: int


def static_bytes(config: RunConfig, layout: Layout, rank: int) -> Static:
    """What this rank of the layout holds. Of a stage's ranks the first holds the most, by padding alone."""
    groups = imagine(layout, rank)
    with torch.device("meta"):
        model = build_model(config, groups, seed=None)
        shape(model, config)
    moment, travels = DTYPES[config.optim.moments].itemsize, DTYPES[config.optim.grad_reduce].itemsize
    held = [*model.buffers(), *(each for each in model.parameters() if not each.requires_grad)]
    weights, gradients, optimizer, travelling = sum(each.nbytes for each in held), 0, 0, 0
    for _, sets in parameter_units(model, groups):
        for flat in flat_buffers(sets):
            dtype = flat.named[0][1].dtype
            weights += flat.size * dtype.itemsize
            gradients += flat.size * _GRADIENT
            optimizer += 0 if dtype == torch.float32 else flat.shard * _MASTER
            optimizer += sum(2 * moment * len(owned) + _COUNTER for owned in flat.owned if owned)
            if travels != _GRADIENT and group_size(flat.replicas) > 1:
                travelling += flat.size * travels
    return Static(weights=weights, gradients=gradients, optimizer=optimizer, travelling=travelling)
