"""Checkpoints that know no layout: canonical tensor names in safetensors files, checked by sha256.

Each rank writes the tensors it owns (an expert is owned by one rank); rank 0 then writes an index
and renames the finished folder into place, so an interrupted save never touches an earlier one:

    checkpoints/step-40/{rank-00000.safetensors, ..., index.json}      checkpoints/latest

Any layout can read any checkpoint, tensor by tensor. Nothing is unpickled. Ranks share a file system.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.collectives import Group, barrier, group_rank, group_size
from parallel.errors import UserError
from parallel.files import durable_file, sync

_INDEX = "index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint open for reading."""

    folder: Path
    state: dict[str, Any]  # what is not a tensor: step, data cursor, ...
    files: dict[str, str]  # tensor name -> file name
    _open: dict[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One tensor by its canonical name. UserError where the checkpoint lacks it."""
        if name not in self.files:
            raise UserError(
                f"checkpoint {self.folder} has no tensor `{name}`: it was made by another model; "
                "start a new run or restore the settings it was made with"
            )
        file = self.files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_tensor(name)

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor into a view. UserError where shape or dtype differ."""
        tensor = self.read(name)
        for what, wanted, found in (
            ("shape", list(target.shape), list(tensor.shape)),
            ("dtype", target.dtype, tensor.dtype),
        ):
            if wanted != found:
                raise UserError(
                    f"tensor `{name}` of checkpoint {self.folder} must have the model's {what} {wanted}, "
                    f"but has {found}: restore the settings it was made with"
                )
        target.copy_(tensor)


def save(
    root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], group: Group, keep: int
) -> Path:
    """Write `root/step-N`; every rank of the group passes the tensors it owns. Keeps the last `keep`."""
    rank, ranks = group_rank(group), group_size(group)
    partial, final = root / f".step-{step}.partial", root / f"step-{step}"
    if rank == 0:
        for leftover in root.glob(".step-*.partial"):  # of saves that were interrupted
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    barrier(group)
    path = partial / f"rank-{rank:05d}.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
    entry = {"sha256": _digest(path), "bytes": path.stat().st_size, "tensors": sorted(tensors)}
    _write(partial / f"rank-{rank:05d}.json", json.dumps(entry))
    barrier(group)
    if rank == 0:
        _finish(partial, final, ranks, {"step": step, "state": dict(state)})
        _prune(root, step, keep)
    barrier(group)
    return final


def _finish(partial: Path, final: Path, ranks: int, index: dict[str, Any]) -> None:
    index["files"] = {}
    for rank in range(ranks):
        entry = partial / f"rank-{rank:05d}.json"
        index["files"][f"rank-{rank:05d}.safetensors"] = json.loads(entry.read_text())
        entry.unlink()
    _write(partial / _INDEX, json.dumps(index))
    sync(partial)
    replaced = final.parent / f".{final.name}.replaced.partial"
    if final.exists():  # the same step, of a run that went back
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    latest = final.parent / ".latest.partial"
    _write(latest, final.name + "\n")
    latest.rename(final.parent / "latest")
    sync(final.parent)


def _prune(root: Path, step: int, keep: int) -> None:
    """Keep the last checkpoints up to `step`; later ones are of a future that the run went back from."""
    kept = [each for each in steps(root) if each <= step][-keep:]
    for each in set(steps(root)).difference(kept):
        shutil.rmtree(root / f"step-{each}")


def steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints under a folder, ascending."""
    names = [entry.name for entry in root.glob("step-*")] if root.is_dir() else []
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint, every file checked against its checksum; UserError names what is broken.

    Where one rank has verified, the others need not read everything again.
    """
    try:
        index = json.loads((folder / _INDEX).read_text())
        files: dict[str, str] = {}
        for name, entry in index["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or (verify and _digest(path) != entry["sha256"]):
                raise UserError(_broken(folder, f"{name} does not match its checksum"))
            files.update(dict.fromkeys(entry["tensors"], name))
        return Checkpoint(folder, index["state"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_broken(folder, f"{type(error).__name__}: {error}")) from error


def open_latest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint; a broken one is named through `warn`. None where none was saved.

    UserError where there are checkpoints but every one is broken.
    """
    found = steps(root)
    for step in reversed(found):
        try:
            return open_checkpoint(root / f"step-{step}")
        except UserError as error:
            if step == found[0]:
                raise
            warn(f"{error}; using an earlier one")
    return None


def _broken(folder: Path, why: str) -> str:
    return f"checkpoint {folder} is broken ({why}): delete it to go on from an earlier one or from the start"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with durable_file(path) as file:
        file.write(text.encode())
