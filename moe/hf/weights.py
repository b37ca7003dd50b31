"""The weights of a model wherever they lie, read rectangle by rectangle.

In released files, in a checkpoint, or in a checkpoint over what its run began from, which holds what was
never trained; adapters are merged in.
"""

import hashlib
import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig
from moe.hf import folder as hf
from moe.hf import names
from moe.hf.fp8 import FP8, read_dequantized, scales_shape
from moe.hf.inventory import complete, from_checkpoint, in_checkpoint, is_adapter, is_bias, released_parts
from moe.hf.places import CHECKPOINTS, Init, Place, find
from moe.hf.tensors import Layered, Merged, Weights
from parallel.checkpoint import DTYPES, Checkpoint, open_checkpoint, open_latest
from parallel.errors import UserError
from parallel.rectangles import Rectangle
from parallel.shards import Piece

logger = logging.getLogger(__name__)

_READERS = 8  # files verified at once


@dataclass(frozen=True)
class Opened:
    """Weights, the configuration that they were trained with, and the folder or checkpoint they lie in."""

    path: Path
    config: ModelConfig
    balance: BalanceConfig
    weights: Weights


def open_weights(path: Path, *, verify: bool = False) -> Opened:
    """The weights of a Hugging Face folder, a converted folder, a run or a checkpoint.

    Of a run, its newest good checkpoint; a checkpoint that holds only what was trained is completed
    from what its run began with. `verify` reads everything once to compare checksums, where there
    are any. UserError says what is missing, broken or of another shape.
    """
    place = find(path)
    if place.is_hf:
        released = Released(place.folder)
        if verify:
            released.verify()
        return Opened(path, released.config, released.balance, released)
    config, balance, _ = place.settings()
    checkpoint = open_saved(place, verify=verify)
    saved = Checkpointed(checkpoint)
    lacking = [name for name in complete(config) if name not in saved.names and not is_bias(name)]
    init, weights = place.init(), cast(Weights, saved)
    if lacking and init is not None:
        weights = Layered(saved, open_init(init, verify=verify), lacking)
    if any(is_adapter(name) for name in weights.names):
        weights = Merged(weights, place.lora_scale())
    return Opened(checkpoint.folder, config, balance, weights)


def open_init(init: Init, *, verify: bool = False) -> Weights:
    """What a run began from, which must still be what it was."""
    if not init.path.exists():
        pruned = init.path.parent.name == CHECKPOINTS
        note = " (its run keeps the newest `train.keep_checkpoints`)" if pruned else ""
        raise UserError(
            "`train.init` must exist as long as its run needs it, "
            f"but `{init.path}` does not{note}: put it back"
        )
    weights = open_weights(init.path, verify=verify).weights
    if init.origin not in (None, weights.origin):
        raise UserError(
            f"`train.init` must stay what the run began from, but `{init.path}` holds other weights now: "
            "put the old ones back, or begin another run"
        )
    return weights


def open_saved(place: Place, *, verify: bool = False) -> Checkpoint:
    """The checkpoint that a place names, or else the newest good one of its run; UserError without one."""
    if place.checkpoint is not None:
        return open_checkpoint(place.checkpoint, verify=verify)
    root = place.folder / CHECKPOINTS
    found = open_latest(root, logger.warning, verify=verify)
    if found is None:
        raise UserError(f"`{root}` must hold a checkpoint, but has none: train the run until it saves one")
    return found


class Released:
    """The files of a Hugging Face folder. All names and shapes are checked before a value is read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stored = folder, hf.read_tensors(folder)
        self.config, self.balance, _ = hf.read_settings(folder, self.stored)
        self._shapes = {name: tuple(shape) for name, shape in complete(self.config).items()}
        self._parts = {
            name: list(released_parts(name, shape, self.config)) for name, shape in self._shapes.items()
        }
        self._check()
        self._open: dict[Path, Any] = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({path for path, _, _ in self.stored.values()})

    @property
    def origin(self) -> str:
        """Over all files, in order."""
        return hashlib.sha256("".join(map(hf.identity, self.files)).encode()).hexdigest()

    @property
    def names(self) -> Collection[str]:
        """The canonical names."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The widest of its parts'; a bias is fp32 whatever the file says."""
        if is_bias(name):
            return torch.float32
        return reduce(torch.promote_types, (self._dtype(part) for part, _ in self._parts[name]))

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor from the parts that it overlaps."""
        wanted = Rectangle(piece.offset, tuple(piece.tensor.shape))
        for name, part in self._parts[piece.name]:
            if common := wanted.common(part):
                piece.tensor[common.inside(wanted)].copy_(self.read(name, common.inside(part)))

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """A rectangle of one released tensor: the only place where a value of a file is read."""
        if self.stored[name].dtype == FP8:
            return read_dequantized(self._slice(name), self._slice(name + names.SCALES), place)
        values: Tensor = self._slice(name)[place]
        return values

    def _slice(self, name: str) -> Any:
        path = self.stored[name].path
        if path not in self._open:
            self._open[path] = open_file(path)
        return self._open[path].get_slice(name)

    def locate(self, name: str) -> tuple[str, Rectangle] | None:
        """Which rectangle of which canonical tensor a released tensor is; None where it carries nothing."""
        found = names.from_hf(name, self.config)
        if found is None or found[0] not in self._parts or name.endswith(names.SCALES):
            return None
        return found[0], self._parts[found[0]][found[1]][1]

    def verify(self) -> None:
        """Compare every file with SHA256SUMS, where there is one."""
        sums = hf.read_sums(self.folder)
        with ThreadPoolExecutor(_READERS) as readers:
            list(readers.map(lambda path: hf.check_sum(path, sums), self.files))

    def _dtype(self, name: str) -> torch.dtype:
        path, dtype, _ = self.stored[name]
        if dtype == FP8:
            return torch.bfloat16
        if dtype not in DTYPES:
            raise UserError(
                f"`{name}` in `{path}` must be of type {', '.join(DTYPES)}, but is {dtype}: convert it first"
            )
        return DTYPES[dtype]

    def _check(self) -> None:
        """Every part must be there in its shape, and nothing may go unread but what carries nothing."""
        known = {part: place for parts in self._parts.values() for part, place in parts}
        for name, place in known.items():
            if name not in self.stored:
                raise UserError(
                    f"`{self.folder}` must hold the tensor `{name}`, but does not: copy the whole model again"
                )
            if self.stored[name].shape != place.extent:
                raise UserError(
                    f"`{name}` in `{self.stored[name].path}` must have shape {place.extent}, but has "
                    f"{self.stored[name].shape}: use the configuration that the weights were trained with"
                )
            self._check_scales(name)
        for name, (path, _, _) in self.stored.items():
            is_known = name.removesuffix(names.SCALES) in known
            if not is_known and not names.carries_nothing(name, self.config):
                raise UserError(
                    f"`{path}` must hold only tensors of the configured model, but has `{name}`: "
                    "use the configuration that the weights were trained with"
                )

    def _check_scales(self, name: str) -> None:
        """An fp8 weight has a scale for each of its blocks, and another has none."""
        weight, scales = self.stored[name], self.stored.get(name + names.SCALES)
        wanted = scales_shape(weight.shape) if weight.dtype == FP8 else None
        found = scales.shape if scales else None
        if found != wanted:
            raise UserError(
                f"`{name}{names.SCALES}` must have shape {wanted} beside a weight of type {weight.dtype}, "
                f"but has {found} (None: is not there) in `{self.folder}`: copy the whole model again"
            )


def open_file(path: Path) -> Any:
    """A safetensors file, memory-mapped; its header was found to be good."""
    return safe_open(path, framework="pt")


class Checkpointed:
    """The weights and selection biases of a checkpoint, without what else training keeps."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = {name for stored in checkpoint.names if (name := from_checkpoint(stored))}

    @property
    def origin(self) -> str:
        """That of the checkpoint's index, which holds the checksum of every file."""
        return self._checkpoint.digest

    @property
    def names(self) -> Collection[str]:
        """The canonical names."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        return self._checkpoint.tensors[in_checkpoint(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        """As it was trained."""
        return self._checkpoint.tensors[in_checkpoint(name)].dtype

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor, cast to its dtype, reading only that."""
        stored = Piece(in_checkpoint(piece.name), piece.shape, piece.offset, piece.tensor)
        self._checkpoint.read_into(stored, cast=True)
