"""A folder put together from safetensors files, by several processes, that a later call continues.

Each file is planned from headers alone; its tensors are read one by one as they are written, so memory
holds one tensor. A finished file leaves an entry with its checksum: whoever is killed, the next call
keeps every file whose entry and content still agree with the plan. The folder has its name when all is there:

    .OUT.partial/{lock, entries/FILE.json, new/...}      new/ becomes OUT

The format of the files: github.com/huggingface/safetensors#format
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint import DTYPE_NAMES
from parallel.errors import UserError
from parallel.files import durable_file, sha256_of, sync, write_json

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """A tensor of a file, and how to get it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of content."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written. `origin` differs wherever the same plan would give other values."""

    name: str
    parts: Sequence[Part]
    origin: str
    facts: dict[str, Any]  # kept in the entry
    check: Callable[[], None]  # of what is read, before it is

    @property
    def nbytes(self) -> int:
        """Bytes of content."""
        return sum(part.nbytes for part in self.parts)

    def ordered(self) -> list[Part]:
        """The parts as they lie in the file: aligned, without gaps between."""
        return sorted(self.parts, key=lambda part: -part.dtype.itemsize)

    def header(self) -> bytes:
        """The first bytes of the file, padded to keep what follows aligned."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in self.ordered():
            begin, end = end, end + part.nbytes
            table[part.key] = {
                "dtype": DTYPE_NAMES[part.dtype],
                "shape": part.shape,
                "data_offsets": (begin, end),
            }
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def digest(self) -> str:
        """What tells this plan from any other."""
        return hashlib.sha256(self.header() + self.origin.encode()).hexdigest()


# Given the folder, and of each finished file its sha256, bytes and facts.
Finish = Callable[[Path, dict[str, dict[str, Any]]], None]


class Assembly:
    """The making of one folder. One process begins and publishes; any number of them write.

    A context: on leaving, the lock is given back, and what is unfinished stays.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f".{target.name}.partial")
        self.new, self._entries = self.partial / "new", self.partial / "entries"
        self._lock = -1

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def begin(self, files: Iterable[PlannedFile]) -> None:
        """Make the unfinished folder, or find it and keep what is of the plan.

        UserError when the target holds anything, or another process is at it.
        """
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise UserError(
                f"`{self.target}` must be new or empty, but is not: choose another folder or remove it"
            )
        try:
            self.new.mkdir(parents=True, exist_ok=True)
            self._entries.mkdir(exist_ok=True)
            self._take_lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            planned = {file.name for file in files}
            for path in [path for path in self.new.rglob("*") if path.is_file()]:
                if path.relative_to(self.new).as_posix() not in planned:  # of another plan
                    path.unlink()
            for name in planned:
                (self.new / name).parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        except BlockingIOError:
            raise UserError(
                f"`{self.target}` must be made by one command at a time, but another is at it: "
                "wait for its end"
            ) from None
        except OSError as error:
            raise self._not_written(self.target, error) from error

    def join(self) -> None:
        """Write with the process that began: while any writer lives, nobody begins anew."""
        self._take_lock(fcntl.LOCK_SH)

    def write(self, files: Iterable[PlannedFile]) -> None:
        """Write every file that is not there yet. UserError when the disk is full."""
        for file in files:
            try:
                if not self._is_finished(file):
                    file.check()
                    self._write(file)
            except OSError as error:
                raise self._not_written(self.new / file.name, error) from error

    def written(self) -> int:
        """Bytes that lie in the unfinished folder now."""
        return sum(path.stat().st_size for path in self.new.rglob("*.safetensors"))

    def publish(self, files: Iterable[PlannedFile], finish: Finish) -> None:
        """Give the folder its name, once all files are there, with what `finish` puts beside them."""
        try:
            finish(self.new, {file.name: self._entry(file) for file in files})
            for path in sorted(self.new.rglob("*")):
                sync(path)
            sync(self.new)
            os.replace(self.new, self.target)
            sync(self.target.parent)
        except OSError as error:
            raise self._not_written(self.target, error) from error
        self.drop()

    def drop(self) -> None:
        """Remove what is unfinished."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _take_lock(self, kind: int) -> None:
        """The kernel frees the lock of a process that is killed."""
        self._lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._lock, kind)

    def _entry_path(self, file: PlannedFile) -> Path:
        return self._entries / f"{file.name.replace('/', '--')}.json"

    def _entry(self, file: PlannedFile) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads(self._entry_path(file).read_text())
        return {"sha256": entry["sha256"], "bytes": entry["bytes"], **file.facts}

    def _is_finished(self, file: PlannedFile) -> bool:
        path, entry_path = self.new / file.name, self._entry_path(file)
        if not (path.exists() and entry_path.exists()):
            return False
        entry = json.loads(entry_path.read_text())
        same = entry["plan"] == file.digest() and entry["bytes"] == path.stat().st_size
        return bool(same and entry["sha256"] == sha256_of(path))

    def _write(self, file: PlannedFile) -> None:
        path, entry_path, digest = self.new / file.name, self._entry_path(file), hashlib.sha256()
        entry_path.unlink(missing_ok=True)
        with durable_file(path) as out:
            out.write(file.header())
            digest.update(file.header())
            for part in file.ordered():
                tensor = part.read()
                assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype, part.shape), part.key
                content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                for begin in range(0, len(content), _CHUNK_BYTES):
                    out.write(content[begin : begin + _CHUNK_BYTES])
                    digest.update(content[begin : begin + _CHUNK_BYTES])
                del tensor, content  # before the next is read
        facts = {"plan": file.digest(), "sha256": digest.hexdigest(), "bytes": path.stat().st_size}
        write_json(entry_path, facts)

    def _not_written(self, path: Path, error: OSError) -> UserError:
        return UserError(
            f"`{path}` must be written, but was not ({error.strerror or error}): make room on the disk and "
            "give the command again, which keeps what is finished"
        )
