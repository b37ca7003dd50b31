"""Checkpoints that know no layout: rectangles of canonical tensors in safetensors files, checked by sha256.

Each rank wrote the rectangles it owned (parallel/saving.py); the index says which file holds which.
Whatever rectangle a rank wants under its own layout is put together from the slices of those that
overlap it, so any layout reads any checkpoint. Nothing is unpickled. Ranks share a file system:

    checkpoints/step-40/{rank-00000.safetensors, ..., index.json}      checkpoints/latest
"""

import hashlib
import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.errors import UserError
from parallel.files import sha256_of
from parallel.rectangles import Rectangle
from parallel.shards import Piece

INDEX = "index.json"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,  # of released weights
    "I64": torch.int64,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_READERS = 8  # files verified at once


@dataclass(frozen=True)
class Saved:
    """A canonical tensor as the index describes it, and the files that hold its rectangles."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    places: list[tuple[str, Rectangle]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint open for reading."""

    folder: Path
    state: dict[str, Any]  # what is not a tensor: step, data cursor, ...
    tensors: dict[str, Saved]
    digest: str  # of the index, which holds the checksum of every file
    _open: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Collection[str]:
        """The canonical names of all tensors."""
        return self.tensors.keys()

    def read(self, name: str) -> Tensor:
        """The whole of a canonical tensor. UserError where the checkpoint lacks it."""
        saved = self._saved(name)
        tensor = torch.empty(saved.shape, dtype=saved.dtype)
        self.read_into(Piece(name, saved.shape, (0,) * len(saved.shape), tensor))
        return tensor

    def read_into(self, piece: Piece, *, cast: bool = False) -> None:
        """Fill a piece's tensor, reading only that. UserError where name, shape or dtype differ.

        `cast` lets another dtype pass: values are converted to the piece's.
        """
        saved = self._saved(piece.name)
        for what, wanted, found in (
            ("shape", list(piece.shape), list(saved.shape)),
            ("dtype", piece.tensor.dtype, saved.dtype),
        ):
            if wanted != found and not (cast and what == "dtype"):
                raise UserError(
                    f"tensor `{piece.name}` of checkpoint {self.folder} must have the model's {what} "
                    f"{wanted}, but has {found}: restore the settings it was made with"
                )
        rectangle = Rectangle(piece.offset, tuple(piece.tensor.shape))
        for file, stored in saved.places:
            if common := rectangle.common(stored):
                part = self._file(file).get_slice(key(piece.name, stored))[common.inside(stored)]
                piece.tensor[common.inside(rectangle)].copy_(part)

    def _saved(self, name: str) -> Saved:
        if name not in self.tensors:
            raise UserError(
                f"checkpoint {self.folder} has no tensor `{name}`: it was made by another model; "
                "start a new run or restore the settings it was made with"
            )
        return self.tensors[name]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def key(name: str, rectangle: Rectangle) -> str:
    """What a rectangle of a canonical tensor is called in its file: `name[0:4,8:16]`."""
    ranges = (f"{o}:{o + n}" for o, n in zip(rectangle.offset, rectangle.extent, strict=True))
    return f"{name}[{','.join(ranges)}]"


def steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints under a folder, ascending."""
    names = [entry.name for entry in root.glob("step-*")] if root.is_dir() else []
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def open_latest(root: Path, warn: Callable[[str], None], *, verify: bool = True) -> Checkpoint | None:
    """The newest good checkpoint; a broken one is named through `warn`. None where none was saved.

    UserError where there are checkpoints but every one is broken.
    """
    found = steps(root)
    for step in reversed(found):
        try:
            return open_checkpoint(root / f"step-{step}", verify=verify)
        except UserError as error:
            if step == found[0]:
                raise
            warn(f"{error}; using an earlier one")
    return None


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint, every file checked against its checksum; UserError names what is broken.

    Where one rank has verified, the others need not read everything again.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        digest = index.pop("sha256")
        if digest != index_digest(index):
            raise UserError(_broken(folder, f"{INDEX} does not match its checksum"))
        _check_files(folder, index["files"], verify)
        return Checkpoint(folder, index["state"], _saved_tensors(index), digest)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(_broken(folder, f"{type(error).__name__}: {error}")) from error


def index_digest(index: dict[str, Any]) -> str:
    """The checksum of an index, which it holds itself as `sha256`."""
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _check_files(folder: Path, files: dict[str, Any], verify: bool) -> None:
    with ThreadPoolExecutor(_READERS) as readers:
        good = readers.map(lambda item: _is_good(folder / item[0], item[1], verify), files.items())
        for name, is_good in zip(files, good, strict=True):
            if not is_good:
                raise UserError(_broken(folder, f"{name} does not match its checksum"))


def _is_good(path: Path, entry: dict[str, Any], verify: bool) -> bool:
    if path.stat().st_size != entry["bytes"]:
        return False
    if not verify:
        return True
    return bool(sha256_of(path) == entry["sha256"])


def _saved_tensors(index: dict[str, Any]) -> dict[str, Saved]:
    tensors = {
        name: Saved(tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in index["tensors"].items()
    }
    for file, entry in index["files"].items():
        for name, offset, extent in entry["pieces"]:
            tensors[name].places.append((file, Rectangle(tuple(offset), tuple(extent))))
    return tensors


def _broken(folder: Path, why: str) -> str:
    return f"checkpoint {folder} is broken ({why}): delete it to go on from an earlier one or from the start"
