"""Gradients of a module over ranks as training sums them, and whole tensors from what the ranks own.

zero = buffers(module, groups)         # every parameter, by the ranks that hold its copies
...                                    # backward
pieces = owned_gradients(zero)         # this rank's rectangles of canonical tensors
gradients = assemble(pieces_of_all)    # each element exactly once
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from moe.config import LayoutConfig
from moe.train.units import replicas
from parallel.groups import Groups
from parallel.shards import Piece, pieces
from parallel.zero import ParameterSet, Zero


def buffers(module: nn.Module, groups: Groups) -> Zero:
    """Give every parameter its place; the marks of shards.py say which ranks hold its copies."""
    sets = [
        ParameterSet(((name, parameter),), replicas(parameter, groups))
        for name, parameter in module.named_parameters()
    ]
    return Zero([("all", sets)], groups.world)


def owned_gradients(zero: Zero) -> list[Piece]:
    """The summed gradients that this rank owns, copied: they may travel and outlive the buffers."""
    zero.finish_reduce()
    return [
        Piece(piece.name, piece.shape, piece.offset, piece.tensor.clone())
        for segment in zero.segments()
        for piece in pieces(segment.name, segment.parameter, segment.grad, segment.begin)
    ]


def assemble(parts: Iterable[Piece]) -> dict[str, Tensor]:
    """Canonical tensors from pieces that tile them: every element comes exactly once."""
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for piece in parts:
        tensor = whole.setdefault(piece.name, torch.full(piece.shape, torch.nan, dtype=piece.tensor.dtype))
        tensor[piece.place] = piece.tensor
        times.setdefault(piece.name, torch.zeros(piece.shape))[piece.place] += 1
    for name, count in times.items():
        assert (count == 1).all(), f"{name}: elements are owned {count.min():g} to {count.max():g} times"
    return whole


def norm_of(zero: Zero) -> float:
    """The 2-norm of the whole model's gradient. All ranks must call."""
    return zero.norms(("",), lambda name: "")[""]


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal to 5e-6 of the expected tensor's norm."""
    assert found.shape == expected.shape, what
    error, size = (found - expected).norm().item(), expected.norm().item()
    assert error <= 5e-6 * size, f"{what}: {error} of {size}"


def canonical(name: str, parameter: Tensor, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, view) pairs of a tensor shaped like a parameter that is not cut."""
    for piece in pieces(name, parameter, tensor.reshape(-1)):
        assert piece.tensor.shape == piece.shape, f"{name} is cut"
        yield piece.name, piece.tensor


def canonical_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a module that is not cut under its canonical names, as views that can be written."""
    for name, parameter in module.named_parameters():
        yield from canonical(name, parameter, parameter.detach())


def ranks_of(layout: LayoutConfig) -> int:
    """How many ranks a layout takes; `dp` None is 1."""
    return layout.tp * layout.cp * layout.pp * (layout.dp or 1)
