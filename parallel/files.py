"""Files and names that survive a power cut, on which atomic renames rest. No torch."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from parallel.errors import UserError


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; on leaving, its bytes are on the disk."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which has its name only when it is whole. UserError where there is one already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`{folder}` must be new or empty, but is not: choose another folder or remove it")
    partial = folder.with_name(f".{folder.name}.unfinished")  # an Assembly's is `.partial`
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync(partial)
        os.replace(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that whoever finds the file finds all of it, on the disk."""
    unfinished = path.with_name(f".{path.name}.partial")
    with durable_file(unfinished) as file:
        file.write(json.dumps(content).encode())
    unfinished.rename(path)


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
