"""Initial weights that know no layout: every canonical tensor draws from a stream named after it."""

import hashlib

import torch
from torch import Tensor, nn

from parallel.shards import parameter_pieces


@torch.no_grad()
def init_weights(module: nn.Module, std: float, seed: int) -> None:
    """Normal(0, std) for matrices, 1 for gains; the same under every layout, whoever holds which part."""
    drawn: tuple[str, Tensor] = ("", torch.empty(0))
    for piece in parameter_pieces(module):
        if len(piece.shape) < 2:
            piece.tensor.fill_(1.0)
            continue
        if drawn[0] != piece.name:  # the pieces of one canonical tensor follow each other
            digest = hashlib.sha256(f"{seed}/{piece.name}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            drawn = piece.name, torch.randn(piece.shape, generator=stream) * std
        piece.tensor.copy_(drawn[1][piece.place])
