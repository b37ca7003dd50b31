"""Canonical tensors of a whole model as readers ask for them, and what is made of one or two such sources.

A reader asks for pieces and gets them cast to the dtype that it asks with; only those are read.
"""

import hashlib
from collections.abc import Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor

from moe.hf.adapter import adapter_of, merge
from moe.hf.inventory import is_adapter
from parallel.shards import Piece


class Weights(Protocol):
    """Canonical tensors of a model. `origin` differs wherever values do."""

    @property
    def origin(self) -> str:
        """A checksum that stands for all values."""
        ...

    @property
    def names(self) -> Collection[str]:
        """The canonical names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored, or as it is read where the stored form is no dtype of ours."""
        ...

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor, cast to its dtype, reading only that."""
        ...


class Layered:
    """What is trained over what it was trained from, of which only what is `lacking` counts."""

    def __init__(self, upper: Weights, lower: Weights, lacking: Collection[str]) -> None:
        self._upper, self._lower = upper, lower
        self._names = {*upper.names, *(name for name in lacking if name in lower.names)}

    @property
    def origin(self) -> str:
        """That of both."""
        return hashlib.sha256(f"{self._upper.origin} {self._lower.origin}".encode()).hexdigest()

    @property
    def names(self) -> Collection[str]:
        """The canonical names."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        return self._holder(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored where it is read from."""
        return self._holder(name).dtype(name)

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor, cast to its dtype, reading only that."""
        self._holder(piece.name).read_into(piece)

    def _holder(self, name: str) -> Weights:
        return self._upper if name in self._upper.names else self._lower


class Merged:
    """Weights that hold adapters too, as the model that both make: in fp32, rounded once."""

    def __init__(self, weights: Weights, scale: float) -> None:
        self._weights, self._scale = weights, scale
        self._adapters = {name for name in weights.names if is_adapter(name)}
        self._names = {name for name in weights.names if not is_adapter(name)}

    @property
    def origin(self) -> str:
        """That of both."""
        return self._weights.origin

    @property
    def names(self) -> Collection[str]:
        """The canonical names, without the adapters."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored without its adapter."""
        return self._weights.dtype(name)

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor, cast to its dtype; of an adapter's halves too only what it needs is read."""
        down, up = adapter_of(piece.name)
        if down not in self._adapters:
            self._weights.read_into(piece)
            return
        rows, columns = piece.place
        rank = slice(0, self._weights.shape(down)[0])
        weight = self._read(piece.name, rows, columns)
        summed = merge(weight, self._read(down, rank, columns), self._read(up, rows, rank), self._scale)
        piece.tensor.copy_(summed)

    def _read(self, name: str, rows: slice, columns: slice) -> Tensor:
        found = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=self.dtype(name))
        self._weights.read_into(Piece(name, self.shape(name), (rows.start, columns.start), found))
        return found


class Held:
    """Whole tensors in memory."""

    origin = "memory"

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in tensors:
            assert name not in self._tensors, f"{name} came twice"
            self._tensors[name] = tensor.detach()

    @property
    def names(self) -> Collection[str]:
        """The canonical names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """As it is held."""
        return self._tensors[name].dtype

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor, cast to its dtype."""
        piece.tensor.copy_(self._tensors[piece.name][piece.place])
