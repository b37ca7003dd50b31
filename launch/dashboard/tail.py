"""Files of a run as they grow or are replaced, read again only where they changed. No torch."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

Value = TypeVar("Value")


class Tail:
    """The rows of a file of JSON lines, in the order in which they are written.

    A resumed run replaces its files, so rows that were given out may be void: `epoch` grows, and all rows are
    given out anew. The open file keeps its inode number from being given to another.
    """

    def __init__(self, path: Path) -> None:
        self.epoch = 0
        self._path = path
        self._file: IO[bytes] | None = None

    def poll(self) -> Iterator[dict[str, Any]]:
        """Whole rows written since the last call; where that makes `epoch` grow, all rows of the file."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return iter(())  # not begun
        if self._file is not None:
            held = os.fstat(self._file.fileno())
            if not os.path.samestat(held, there) or there.st_size < self._file.tell():
                self.close()
                self.epoch += 1
        if self._file is None:
            self._file = self._path.open("rb")
        return self._rows(self._file)

    def _rows(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        while (line := file.readline()).endswith(b"\n"):
            yield json.loads(line)
        file.seek(-len(line), os.SEEK_CUR)  # half a line is written: wait for the rest

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Kept(Generic[Value]):
    """What `parse` makes of a small file's text; `missing` where there is none."""

    def __init__(self, path: Path, parse: Callable[[str], Value], missing: Value) -> None:
        self._path, self._parse, self._missing = path, parse, missing
        self._stamp: tuple[int, int] | None = None
        self._value = missing

    def get(self) -> Value:
        """The newest value, or the one before while a file is broken."""
        try:
            there = self._path.stat()
            stamp = (there.st_mtime_ns, there.st_ino)
            if stamp != self._stamp:
                self._value, self._stamp = self._parse(self._path.read_text(encoding="utf-8")), stamp
        except FileNotFoundError:
            self._value, self._stamp = self._missing, None
        except ValueError:
            pass
        return self._value
