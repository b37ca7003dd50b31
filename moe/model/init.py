"""Initial weights that know no layout: every canonical tensor draws from a stream named after it."""

import hashlib

import torch
from torch import nn

from parallel.shards import canonical_parameters


@torch.no_grad()
def init_weights(module: nn.Module, std: float, seed: int) -> None:
    """Normal(0, std) for matrices, 1 for gains; the same under every layout, since experts draw singly."""
    for name, tensor in canonical_parameters(module):
        if tensor.dim() < 2:
            tensor.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        tensor.copy_(torch.randn(tensor.shape, generator=stream) * std)
