"""A small model cut and replicated in several ways over 1, 2 or 4 ranks, with gradients known in advance.

Every parameter is part of a canonical tensor that no layout changes. What the copies of a part add to its
gradient are small integers that sum to the same canonical gradient, exactly, in any order and layout.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import Group
from parallel.shards import Cut, Piece, mark_cut, mark_experts, pieces
from parallel.zero import ParameterSet, Zero


class Spec(NamedTuple):
    """A canonical tensor: how many of four ranks hold copies of a part, how far apart, and the dim cut."""

    shape: tuple[int, ...]
    copies: int
    distance: int
    dim: int


EXPERTS = "layer.experts.up.weight"
SPECS = {  # sizes are uneven and leave padding
    "wide.weight": Spec((13, 17), copies=4, distance=1, dim=0),
    "wide.gain": Spec((6,), copies=4, distance=1, dim=0),
    "pair.weight": Spec((4, 66), copies=2, distance=1, dim=1),
    EXPERTS: Spec((4, 3, 25), copies=2, distance=2, dim=0),
    "own.weight": Spec((40, 3), copies=1, distance=1, dim=0),
    "late.weight": Spec((5, 9), copies=4, distance=1, dim=0),
}
UNITS = {
    "first": [["wide.weight", "wide.gain"], ["pair.weight"]],
    "last": [[EXPERTS], ["own.weight"], ["late.weight"]],
}
Flat = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]  # a piece that can travel between processes


class Place(NamedTuple):
    """Which part of a canonical tensor a rank holds, of how many, and which copy of it, of how many."""

    part: int
    parts: int
    copy: int
    copies: int


def place(name: str, rank: int, world_size: int) -> Place:
    copies = min(SPECS[name].copies, world_size)
    distance = min(SPECS[name].distance, world_size // copies)
    block = copies * distance
    part = rank // block * distance + rank % distance
    return Place(part, world_size // copies, rank % block // distance, copies)


def _local(name: str, whole: Tensor, rank: int, world_size: int) -> Tensor:
    here = place(name, rank, world_size)
    return whole.chunk(here.parts, SPECS[name].dim)[here.part]


def start(name: str) -> Tensor:
    """The canonical weight before training."""
    seed = list(SPECS).index(name)
    return torch.randn(SPECS[name].shape, generator=torch.Generator().manual_seed(seed))


def _integers(name: str, step: int, copy: int) -> Tensor:
    seed = 1000 * step + 10 * list(SPECS).index(name) + copy
    return torch.randint(-4, 5, SPECS[name].shape, generator=torch.Generator().manual_seed(seed)).float()


def gradient(name: str, step: int = 0) -> Tensor:
    """The canonical gradient of a step, summed over all copies."""
    return _integers(name, step, 0)


def add_gradients(
    parameters: dict[str, nn.Parameter],
    rank: int,
    world_size: int,
    step: int = 0,
    names: Iterable[str] = SPECS,
) -> None:
    """Add this rank's share of the gradients of a step: the first copy makes up for what the others add."""
    for name in names:
        here = place(name, rank, world_size)
        share = _integers(name, step, here.copy)
        if here.copy == 0:
            share = share - sum(_integers(name, step, copy) for copy in range(1, here.copies))
        parameters[name].main_grad.add_(_local(name, share, rank, world_size))  # type: ignore[attr-defined]


def build(
    rank: int, world_size: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[dict[str, nn.Parameter], Zero]:
    """This rank's parameters in their buffers; the gain is fp32 whatever the dtype of the rest."""
    parameters: dict[str, nn.Parameter] = {}
    groups: dict[tuple[int, int], Group] = {}  # units share them
    for name, spec in SPECS.items():
        weight = _local(name, start(name), rank, world_size)
        parameters[name] = nn.Parameter(weight.to(torch.float32 if name == "wide.gain" else dtype))
        here = place(name, rank, world_size)
        if name == EXPERTS:
            each = spec.shape[0] // here.parts
            mark_experts(parameters[name], tuple(range(here.part * each, (here.part + 1) * each)))
        else:
            mark_cut(parameters[name], Cut(dim=spec.dim, index=here.part, count=here.parts))
        if spec[1:3] not in groups:
            groups[spec[1:3]] = _replicas(name, rank, world_size)
    units = [
        (
            unit,
            [
                ParameterSet(tuple((n, parameters[n]) for n in names), groups[SPECS[names[0]][1:3]])
                for names in sets
            ],
        )
        for unit, sets in UNITS.items()
    ]
    return parameters, Zero(units, dist.group.WORLD if world_size > 1 else None, **options)


def _replicas(name: str, rank: int, world_size: int) -> Group:
    """The group of the ranks that hold the same part. Every rank must call."""
    mine: Group = None
    for part in range(place(name, rank, world_size).parts):
        ranks = [each for each in range(world_size) if place(name, each, world_size).part == part]
        if len(ranks) > 1:
            group = dist.new_group(ranks)
            mine = group if rank in ranks else mine
    return mine


def owned(zero: Zero, kind: str) -> Iterator[Piece]:
    """The weights, masters or gradients that this rank owns, as `kind/canonical name`."""
    for segment in zero.segments():
        flat = getattr(segment, kind)
        yield from pieces(f"{kind}/{segment.name}", segment.parameter, flat, segment.begin)


def travelling(held: Iterable[Piece]) -> list[Flat]:
    """Pieces as plain values."""
    return [(piece.name, piece.shape, piece.offset, piece.tensor.clone()) for piece in held]


def assembled(by_rank: Iterable[list[Flat]]) -> dict[str, Tensor]:
    """Canonical tensors put together from what all ranks hold; every element must be held exactly once."""
    tensors: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for name, shape, offset, tensor in (flat for rank in by_rank for flat in rank):
        whole = tensors.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
        rectangle = Piece(name, shape, offset, tensor).place
        whole[rectangle] = tensor
        held.setdefault(name, torch.zeros(shape, dtype=torch.int64))[rectangle] += 1
    assert all(count.eq(1).all() for count in held.values())
    return tensors


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def canonical(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors as `kind/canonical name`, every expert by itself."""
    result = {}
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor)
        if name == EXPERTS:
            mark_experts(parameter, tuple(range(len(parameter))))
        for piece in pieces(f"{kind}/{name}", parameter, tensor.reshape(-1)):
            result[piece.name] = piece.tensor
    return result
