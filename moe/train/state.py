"""What a checkpoint of training holds and how it is put back: weights, moments, bias, cursor and the rest.

Every tensor is a piece of a canonical one, so any layout can read what any other wrote. A rank writes the
shards that it owns as the optimizer does; what is small and everywhere is written once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe.model.transformer import Transformer
from moe.train.step import Trainer
from parallel.checkpoint import Checkpoint
from parallel.shards import Piece


@dataclass(frozen=True)
class Position:
    """Where training stands: steps done, sequences and real tokens read."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0


def owned(trainer: Trainer) -> list[Piece]:
    """What this rank writes: over all ranks every element of every tensor once."""
    groups = trainer.groups
    found = list(trainer.engine.owned())
    if groups.rank % groups.layout.stage_size == 0 and groups.is_first_copy:
        found += _router_state(trainer.model)
    if groups.rank == 0:
        found.append(_whole("random/torch", torch.get_rng_state()))
    return found


def load(trainer: Trainer, saved: Checkpoint) -> Position:
    """Put everything back, under whatever layout this trainer has. UserError where it does not fit."""
    for piece in (*trainer.engine.owned(), *_router_state(trainer.model)):
        saved.read_into(piece)
    torch.set_rng_state(saved.read("random/torch"))
    position = Position(**saved.state)
    trainer.engine.written(position.step)
    return position


def _router_state(model: Transformer) -> Iterator[Piece]:
    for layer, router in model.routers():
        yield _whole(f"router/{layer}.bias", router.bias)
        yield _whole(f"router/{layer}.last_counts", router.last_counts)


def _whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)
