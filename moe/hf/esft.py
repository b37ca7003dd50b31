"""Changed experts only, under their released names, and back into the model they were changed of.

An adapter is a folder as DeepSeek's ESFT has them: safetensors files of the trained tensors, here one for
each layer, and the selection (moe/selection.py). Released adapters leave out `model.` before the names.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.config import ModelConfig
from moe.hf import names
from moe.hf.folder import identity, read_header
from moe.hf.inventory import released_parts
from moe.hf.tensors import Layered
from moe.hf.weights import Opened, open_file
from moe.selection import FILE, Selection, as_json
from parallel.errors import UserError
from parallel.files import new_folder, sync
from parallel.shards import Piece


def save_changed(
    folder: Path, model: ModelConfig, selection: Selection, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write those of canonical (name, tensor) pairs that the selection trains to a new folder.

    Tensors of a layer follow each other, and one layer at a time is held.
    """
    trained = ((name, tensor) for name, tensor in tensors if selection.trains(name))
    with new_folder(folder) as partial:
        for number, (_, layer) in enumerate(groupby(trained, lambda pair: pair[0].split(".")[:2])):
            released: dict[str, Tensor] = {}
            for name, tensor in layer:
                parts = names.to_hf(name, model)
                released |= zip(parts, (part.clone() for part in tensor.chunk(len(parts))), strict=True)
            _write(released, partial / f"changed-{number:05d}.safetensors")
        path = partial / FILE
        path.write_text(json.dumps(as_json(selection, model)) + "\n", encoding="utf-8")
        sync(path)


class Changed:
    """The tensors of an adapter by their canonical names, in the types of the model that they belong to.

    Files are mapped; of a tensor only its parts are read, when it is asked for. UserError where there is no
    adapter, or a tensor has no place in the model.
    """

    def __init__(self, folder: Path, base: Opened) -> None:
        self._base, self._parts = base, dict[str, dict[int, Tensor]]()
        self._files = sorted(folder.glob("*.safetensors"))
        if not self._files:
            raise UserError(f"`{folder}` must hold safetensors files, but has none: give an adapter's folder")
        for path in self._files:
            read_header(path)  # says what is wrong with a broken file
            with open_file(path) as file:
                for name in file.keys():  # noqa: SIM118
                    ours, part = self._place(name, path)
                    self._parts.setdefault(ours, {})[part] = file.get_tensor(name)
        for name, parts in self._parts.items():
            for index, (released, place) in enumerate(released_parts(name, self.shape(name), base.config)):
                found = tuple(parts[index].shape) if index in parts else None
                if found != place.extent:
                    raise UserError(
                        f"`{released}` in `{folder}` must have shape {place.extent}, but has {found} (None: "
                        "is not there): use the model that it was made from"
                    )

    def _place(self, name: str, path: Path) -> tuple[str, int]:
        whole = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        place = None if name.endswith(names.SCALES) else names.from_hf(whole, self._base.config)
        if place is None or place[0] not in self._base.weights.names:
            raise UserError(
                f"`{self._base.path}` must have the tensors of `{path}`, but lacks `{whole}`: use the model "
                "that it was made from"
            )
        return place

    @property
    def origin(self) -> str:
        """Over all files, in order."""
        return hashlib.sha256("".join(map(identity, self._files)).encode()).hexdigest()

    @property
    def names(self) -> Collection[str]:
        """The canonical names."""
        return self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole canonical tensor."""
        return self._base.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The model's."""
        return self._base.weights.dtype(name)

    def read_into(self, piece: Piece) -> None:
        """Fill a piece's tensor, cast to its dtype."""
        parts = self._parts[piece.name]
        piece.tensor.copy_(torch.cat([parts[number] for number in sorted(parts)])[piece.place])


def merged(base: Opened, adapter: Path) -> Opened:
    """A model with an adapter's tensors in place of its own."""
    return replace(base, weights=Layered(Changed(adapter, base), base.weights, base.weights.names))


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    sync(path)
