"""Changed experts only, under their released names, and back into the model they were changed of.

An adapter is a folder as DeepSeek's ESFT has them: safetensors files of the trained tensors, here one for
each layer, and the selection (moe/selection.py). Released adapters leave out `model.` before the names.
"""

import json
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.config import ModelConfig
from moe.hf import names
from moe.selection import FILE, Selection, as_json
from parallel.errors import UserError
from parallel.files import new_folder, sync


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


def merge_changed(base: Path, adapter: Path, folder: Path) -> int:
    """A Hugging Face folder with an adapter's tensors in place of its own; how many there were.

    All else is the base's, bit for bit; changed tensors are cast to its types. One file is held at a
    time. UserError where a tensor has no place in the base.
    """
    changed = _index(adapter)
    left = set(changed)
    with new_folder(folder) as partial:
        for path in sorted(entry for entry in base.iterdir() if entry.is_file()):
            if path.suffix == ".safetensors":
                left -= _merge_file(path, changed, partial / path.name)
            else:
                shutil.copyfile(path, partial / path.name)
        if left:
            raise UserError(
                f"`{base}` must have the tensors of `{adapter}`, but lacks `{min(left)}`: use the model that "
                "it was made from"
            )
    return len(changed)


class _Place(NamedTuple):
    """Where a changed tensor is stored."""

    path: Path
    name: str


def _index(adapter: Path) -> dict[str, _Place]:
    """Every tensor of an adapter by its name in a whole model."""
    found = {}
    for path in sorted(adapter.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                is_whole = name.startswith(("model.", "lm_head."))
                found[name if is_whole else f"model.{name}"] = _Place(path, name)
    if not found:
        raise UserError(f"`{adapter}` must hold safetensors files, but has none: give an adapter's folder")
    return found


def _merge_file(path: Path, changed: dict[str, _Place], target: Path) -> set[str]:
    """Write a file with its changed tensors; their names."""
    with safe_open(path, framework="pt") as file:
        held = list(file.keys())
        replaced = changed.keys() & held
        if not replaced:
            shutil.copyfile(path, target)
            return replaced
        tensors = {name: file.get_tensor(name) for name in held}
    for name in replaced:
        source, inside = changed[name]
        with safe_open(source, framework="pt") as file:
            tensor = file.get_tensor(inside)
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"`{name}` in `{source}` must have shape {tuple(tensors[name].shape)}, but has "
                f"{tuple(tensor.shape)}: use the model that it was made from"
            )
        tensors[name] = tensor.to(tensors[name].dtype)
    _write(tensors, target)
    return replaced


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    sync(path)
