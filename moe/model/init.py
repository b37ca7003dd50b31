"""Initial weights that know no layout: every canonical tensor draws from a stream named after it."""

import hashlib
from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor, nn

from parallel.shards import Piece, parameter_pieces

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@torch.no_grad()
def init_weights(module: nn.Module, std: float, seed: int, only: Container[str] | None = None) -> None:
    """Normal(0, std) for matrices, 1 for gains; the same under every layout, whoever holds which part.

    With `only` the other canonical tensors stay as they are.
    """
    held = [piece for piece in parameter_pieces(module) if only is None or piece.name in only]
    for piece in held:
        if len(piece.shape) < 2:
            piece.tensor.fill_(1.0)
    matrices = (piece for piece in held if len(piece.shape) > 1)
    _fill(matrices, seed, lambda shape, stream: torch.randn(shape, generator=stream) * std)


@torch.no_grad()
def init_adapters(module: nn.Module, seed: int) -> None:
    """U(-1, 1) / sqrt(inputs) for an adapter's way down, 0 for its way up: it begins by adding nothing."""
    held = list(parameter_pieces(module))
    for piece in held:
        if piece.name.endswith("lora.up.weight"):
            piece.tensor.zero_()
    down = (piece for piece in held if piece.name.endswith("lora.down.weight"))
    _fill(down, seed, lambda shape, stream: (2 * torch.rand(shape, generator=stream) - 1) * shape[1] ** -0.5)


def _fill(held: Iterable[Piece], seed: int, draw: Draw) -> None:
    drawn: tuple[str, Tensor] = ("", torch.empty(0))
    for piece in held:
        if drawn[0] != piece.name:  # the pieces of one canonical tensor follow each other
            digest = hashlib.sha256(f"{seed}/{piece.name}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            drawn = piece.name, draw(piece.shape, stream)
        piece.tensor.copy_(drawn[1][piece.place])
