"""What a checkpoint of training holds and how it is put back: weights, moments, bias, cursor and the rest."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.train.step import Trainer
from parallel import checkpoint
from parallel.groups import Groups
from parallel.shards import canonical


@dataclass(frozen=True)
class Position:
    """Where training stands: steps done, sequences and real tokens read."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0


def save(trainer: Trainer, root: Path, position: Position, keep: int) -> Path:
    """Write a checkpoint after `position.step` steps. Every rank must call."""
    groups = trainer.groups
    owned = {name: tensor for name, tensor in _tensors(trainer) if _owns(name, groups)}
    if groups.rank == 0:
        owned["random/torch"] = torch.get_rng_state()
    return checkpoint.save(root, position.step, owned, asdict(position), groups.dp, keep)


def load(trainer: Trainer, saved: checkpoint.Checkpoint) -> Position:
    """Put everything back, under whatever layout this trainer has. UserError where it does not fit."""
    for name, tensor in _tensors(trainer):
        saved.read_into(name, tensor)
    torch.set_rng_state(saved.read("random/torch"))
    position = Position(**saved.state)
    trainer.optimizer.set_steps(position.step)
    return position


def _tensors(trainer: Trainer) -> list[tuple[str, Tensor]]:
    named = [
        (f"model/{full_name}", view)
        for name, parameter in trainer.model.named_parameters()
        for full_name, view in canonical(name, parameter, parameter.detach())
    ]
    named.extend(trainer.optimizer.state())
    for layer, router in trainer.model.routers():
        named += [(f"router/{layer}.bias", router.bias), (f"router/{layer}.last_counts", router.last_counts)]
    return named


def _owns(name: str, groups: Groups) -> bool:
    """One rank writes each tensor: an expert the first rank that holds it, everything else rank 0."""
    if ".experts." in name:
        return groups.rank < groups.layout.ep
    return groups.rank == 0
