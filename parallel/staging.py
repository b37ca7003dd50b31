"""Pieces copied to host memory, as the safetensors file they will be written to.

One buffer holds the file's content, so that a save costs training one copy and a checksum can be
taken while the file is written. The format: github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint import DTYPE_NAMES, key
from parallel.rectangles import Rectangle
from parallel.shards import Piece

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Staged:
    """A rank's file in host memory, and what the index will say of it."""

    header: bytes
    content: Tensor  # uint8
    pieces: list[list[Any]]  # name, dtype and shape of the canonical tensor, offset, extent

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file; the header is padded to keep what follows aligned."""
        header = self.header + b" " * (-len(self.header) % 8)
        yield len(header).to_bytes(8, "little") + header
        content = self.content.numpy().data
        for begin in range(0, len(content), _CHUNK_BYTES):
            yield content[begin : begin + _CHUNK_BYTES]


class Staging:
    """A host buffer that is kept from save to save; what it holds is good until the next `copy`."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, pieces: Iterable[Piece]) -> Staged:
        """Copy what pieces hold now. An empty piece makes its tensor known, but is not in the file."""
        pieces = sorted(pieces, key=lambda piece: -piece.tensor.itemsize)  # aligned, without gaps between
        num_bytes = sum(piece.tensor.nbytes for piece in pieces)
        on_device = any(piece.tensor.is_cuda for piece in pieces)
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_device)
        header: dict[str, Any] = {}
        described: list[list[Any]] = []
        end = 0
        for piece in pieces:
            tensor, begin, end = piece.tensor, end, end + piece.tensor.nbytes
            target = self._buffer[begin:end].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor, non_blocking=True)
            dtype, extent = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            described.append([piece.name, dtype, piece.shape, piece.offset, extent])
            if tensor.numel():
                facts = {"dtype": dtype, "shape": extent, "data_offsets": (begin, end)}
                header[key(piece.name, Rectangle(piece.offset, extent))] = facts
        if on_device:
            torch.cuda.synchronize()
        return Staged(json.dumps(header).encode(), self._buffer[:num_bytes], described)
