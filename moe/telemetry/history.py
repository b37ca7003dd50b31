"""The expert load of a run, finished or running, as one `History`: its archive, then its rows. No torch.

Rows are read in stretches and coarsened on the way, so that what is held depends on the number of frames
asked for and not on the run's length. A live run is followed by position: what is new is what comes
after the last row taken. That row's own bytes tell whether the position still holds. If the file was
replaced (archived steps cut off, a resume) they are looked for; where they are gone, so is what was read
before, and reading starts over.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moe.telemetry.archive import EXPERT_LOAD, before_step, last_line, read_segments, step_blocks, step_of
from moe.telemetry.frames import Growing, History
from moe.telemetry.load import Layer
from moe.telemetry.rows import BadRow
from moe.telemetry.tables import from_lines

Signature = tuple[int, int, int]


def read_history(run: str | Path, most: int | None = None) -> History:
    """The expert load of a run's folder, in at most `most` frames; without rows, a history of none.

    Not much more than 2 x `most` frames are in memory at any time. Raises BadRow naming the file when
    a whole line is not a row.
    """
    follower = Follower(run, most)
    follower.poll()
    return follower.history if most is None else follower.history.coarsened(most)


def read_parts(run: str | Path) -> Iterator[History]:
    """The expert load of a run's folder at full resolution: stretch by stretch, oldest first."""
    return Reader(run).read()[1]


class Follower:
    """The history of a run that may still be written; `poll` takes in what is new.

    At most 2 x `most` frames are held (None: any number): when there would be more, neighbouring ones are
    summed until `most` are left. `epoch` grows whenever frames that were there before have changed.
    """

    def __init__(self, run: str | Path, most: int | None) -> None:
        self._reader, self._most = Reader(run), most
        self._held = Growing(most)
        self.epoch = 0

    @property
    def history(self) -> History:
        """What is held by now, oldest first."""
        return self._held.history

    def poll(self) -> bool:
        """Take in what was written since; whether anything changed."""
        fresh, parts = self._reader.read()
        shown = len(self.history) > 0
        changed = merged = fresh and shown
        if fresh:
            self._held = Growing(self._most)
        for part in parts:
            merged |= self._held.add(part, coarse=fresh) and shown
            changed = True
        self.epoch += merged
        return changed


class Reader:
    """Reads the archive and the rows of a run once, and then the rows that come."""

    def __init__(self, run: str | Path) -> None:
        self._run, self._path = Path(run), Path(run) / EXPERT_LOAD
        self._seen: Signature | None = None
        self._layers: tuple[Layer, ...] | None = None
        self._position, self._line = 0, b""  # up to where rows were taken, and the last of them
        self._last = 0  # step

    def read(self) -> tuple[bool, Iterator[History]]:
        """Whether reading starts over, and whole steps at full resolution, in stretches, to be used up."""
        first = self._seen is None
        seen = _signature(self._path)
        if seen == self._seen:
            return False, iter(())
        self._seen = seen
        file = self._path.open("rb") if self._path.exists() else None
        fresh = first or file is None or not self._find(file)
        return fresh, self._parts(file, fresh)

    def _find(self, file: IO[bytes]) -> bool:
        """Stand behind the last row taken, wherever it is now; whether only later steps follow it."""
        if not self._line:
            return False
        start = self._position - len(self._line)
        file.seek(start)
        if file.read(len(self._line)) != self._line:
            if not file.seek(0, os.SEEK_END):  # a run that began anew has no row yet
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = content.rfind(self._line)
            if start < 0:
                return False
        self._position = start + len(self._line)
        file.seek(self._position)
        following = file.readline()
        return not following.endswith(b"\n") or step_of(following) > self._last

    def _parts(self, file: IO[bytes] | None, fresh: bool) -> Iterator[History]:
        # The rows are open before segments are listed: what is archived meanwhile is still in this file.
        if fresh:
            self._position, self._line, self._last, self._layers = 0, b"", 0, None
            for part in read_segments(self._run):
                self._layers, self._last = part.layers, part.last
                yield part
        if file is None:
            return
        begin, archived = self._position, self._last
        with file:
            file.seek(begin)
            for lines in step_blocks(file):
                known = before_step(lines, archived + 1) if step_of(lines) <= archived else 0
                part = self._parse(lines[known:])
                if len(part):
                    taken = lines[: before_step(lines, part.last + 1)]
                    self._position, self._line = begin + len(taken), last_line(taken)
                    self._layers, self._last = part.layers, part.last
                    yield part
                begin += len(lines)

    def _parse(self, lines: bytes) -> History:
        try:
            return from_lines(lines, self._layers)
        except ValueError as error:
            where = f"{self._path}, {len(lines):,} bytes from byte {self._position:,} on"
            raise BadRow(f"{where}: a line is not a JSON row of expert load: repair it") from error


def _signature(path: Path) -> Signature:
    if not path.exists():
        return 0, 0, 0
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
