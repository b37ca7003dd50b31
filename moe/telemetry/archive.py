"""Expert load of a long run: its last steps in full, older ones summed and packed away. No torch.

`expert_load.jsonl` grows by kilobytes per layer and step, which nobody reads step by step after a week.
It holds the last `full_steps` steps and up to a quarter more: then that quarter is summed over windows of
`thin_steps` steps (1 to 10, 11 to 20, ...) into a segment `expert_load/steps-FIRST-LAST.parquet` and cut
off. The newest segment is replaced by a longer one until it holds SEGMENT_FRAMES windows: files stay few.

The order makes a crash harmless: a segment is whole before what it replaces goes. Rows of steps that a
segment holds, and segments whose steps another one holds, are passed over by readers.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe.telemetry.frames import History, empty, join
from moe.telemetry.rows import BadRow, JsonLines, replacing
from moe.telemetry.tables import from_lines, read_segment, write_segment

EXPERT_LOAD, SEGMENTS = "expert_load.jsonl", "expert_load"
SEGMENT_FRAMES = 200  # windows of a full segment
BLOCK_BYTES = 1 << 24  # of rows that are held at once

_STEP = re.compile(rb'\{"step": ?(\d+),')
_NAME = re.compile(r"steps-(\d+)-(\d+)\.parquet")


class Archive:
    """Writes the expert load of a run, from after `step` on; what a killed attempt wrote later is removed.

    Windows that reach beyond `step` are dropped whole, and with them their segment's sums of domains and
    pairs. Only a resume from a checkpoint older than the last `full_steps` steps meets that.
    """

    def __init__(self, run: str | Path, full_steps: int, thin_steps: int, step: int) -> None:
        self._run, self._path = Path(run), Path(run) / EXPERT_LOAD
        self._full, self._thin = full_steps, thin_steps
        self._stride = max(1, full_steps // 4 // thin_steps) * thin_steps  # steps that are packed at once
        held = segments(self._run)
        for segment in _all_segments(self._run):
            if segment not in held:
                segment.path.unlink()
            elif segment.last > step:
                self._trim(segment, step)
        self._keep_rows(max((segment.last for segment in segments(self._run)), default=0), step)
        self._oldest = next((step_of(line) for line in self._rows()), None)  # step of the first row
        self._lines = JsonLines(self._path)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one step, every layer's; they are flushed together."""
        if not rows:
            return
        self._lines.write(*rows)
        newest = rows[0]["step"]
        self._oldest = newest if self._oldest is None else self._oldest
        last = (newest - self._full) // self._stride * self._stride  # decided by the step alone:
        if self._oldest <= last:  # a resumed run packs where an uninterrupted one does
            self._pack(last)
            self._oldest = last + 1

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _trim(self, segment: "Segment", step: int) -> None:
        with segment.path.open("rb") as file:
            _write(self._run, replace(read_segment(file).until(step), domains={}, pairs=None))
        segment.path.unlink()

    def _keep_rows(self, archived: int, step: int) -> None:
        """Keep the whole rows after `archived` to `step`, byte for byte."""
        with replacing(self._path) as kept:
            kept.writelines(line for line in self._rows() if archived < step_of(line) <= step)

    def _rows(self) -> Iterator[bytes]:
        if self._path.exists():
            with self._path.open("rb") as file:
                yield from (line for line in file if line.endswith(b"\n"))

    def _pack(self, last: int) -> None:
        """Move the steps up to `last`, which ends a window, from the rows to a segment."""
        self._lines.close()
        newest = segments(self._run)[-1:]
        packed = empty()
        if newest:
            with newest[0].path.open("rb") as file:
                packed = read_segment(file)
        replaced = newest if len(packed) < SEGMENT_FRAMES else []
        packed = packed if replaced else empty()
        with self._path.open("rb") as file:
            end = _end_of(file, last)
            file.seek(0)
            for block in step_blocks(file, end):
                packed = join([packed, from_lines(block).binned(self._thin)]).binned(self._thin)
            _write(self._run, packed)
            for segment in replaced:
                segment.path.unlink()
            file.seek(end)
            with replacing(self._path) as rest:
                shutil.copyfileobj(file, rest, BLOCK_BYTES)
        self._lines = JsonLines(self._path)


class Segment(NamedTuple):
    """A file of windows and the steps that it covers."""

    first: int
    last: int
    path: Path


def segments(run: Path) -> list[Segment]:
    """The segments of a run, oldest first, without those that a longer one replaces."""
    found: list[Segment] = []
    for segment in sorted(_all_segments(run), key=lambda segment: (segment.first, -segment.last)):
        if not found or segment.last > found[-1].last:
            found.append(segment)
    return found


def _all_segments(run: Path) -> list[Segment]:
    paths = [(_NAME.fullmatch(path.name), path) for path in (run / SEGMENTS).glob("*.parquet")]
    return [Segment(int(name[1]), int(name[2]), path) for name, path in paths if name]


def read_segments(run: Path) -> Iterator[History]:
    """The windows of a run's segments, oldest first, a segment at a time.

    A writer may put a longer segment in the place of one at any time, hence the look for each anew.
    """
    done = 0
    while later := [segment for segment in segments(run) if segment.first > done]:
        try:
            with later[0].path.open("rb") as file:
                yield read_segment(file)
        except FileNotFoundError:
            continue
        done = later[0].last


def step_of(line: bytes) -> int:
    """The step of a row of JSON, without reading the whole row if it comes first; BadRow if it has none."""
    found = _STEP.match(line)
    try:
        return int(found[1] if found else json.loads(line)["step"])
    except (ValueError, LookupError, TypeError) as error:
        begin = ascii(line[:40])[1:]
        raise BadRow(f"a line of {EXPERT_LOAD} must be a JSON row, but begins {begin}: remove it") from error


def step_blocks(file: IO[bytes], end: int | None = None) -> Iterator[bytes]:
    """Whole lines from where `file` stands to byte `end`, some megabytes at a time.

    A block ends where a step ends; the last one ends with the last whole line.
    """
    rest = b""
    while chunk := file.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - file.tell())):
        lines = rest + chunk
        cut = before_step(lines, step_of(last_line(lines))) if b"\n" in lines else 0
        if cut:
            yield lines[:cut]
        rest = lines[cut:]
    if b"\n" in rest:
        yield rest[: rest.rindex(b"\n") + 1]


def last_line(lines: bytes) -> bytes:
    """The last whole line of some."""
    end = lines.rindex(b"\n")
    return lines[lines.rfind(b"\n", 0, end) + 1 : end + 1]


def before_step(lines: bytes, step: int) -> int:
    """How many bytes the whole lines take that come before the trailing ones of `step` and later."""
    end = lines.rfind(b"\n") + 1
    while end:
        begin = lines.rfind(b"\n", 0, end - 1) + 1
        if step_of(lines[begin:end]) < step:
            return end
        end = begin
    return 0


def _end_of(file: IO[bytes], step: int) -> int:
    end = 0
    for line in file:
        if step_of(line) > step:
            break
        end += len(line)
    return end


def _write(run: Path, history: History) -> None:
    if not len(history):
        return
    first = history.steps[0] - history.spans[0] + 1
    path = run / SEGMENTS / f"steps-{first:08d}-{history.last:08d}.parquet"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        write_segment(file, history)
