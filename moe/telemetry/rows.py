"""Append-only JSON lines that survive a killed writer, and files replaced in one step. No torch.

A row is one line and is flushed at once, so a reader sees whole steps while a run is alive. A line
without its newline was cut short by a crash: readers skip it and `trim_after` removes it. JSON has no
NaN and no infinity; both are written as null.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class BadRow(ValueError):
    """A line of a run's file is no row: one sentence, for the user to read."""


class JsonLines:
    """Appends one JSON object per row to a file, made if needed. On resume call `trim_after` first."""

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (held until `close`)

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append rows of plain values and flush them together; NaN and infinities become null."""
        self._file.write("".join(_line(row) for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(row: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(row, allow_nan=False, separators=(",", ":"))
    except ValueError:  # rare, and looking for it in thousands of counts would cost more than the rest
        text = json.dumps(finite(row), allow_nan=False, separators=(",", ":"))
    return text + "\n"


def finite(value: Any) -> Any:
    """A plain value as JSON can hold it: NaN and infinities, however deep, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every whole row of a file, in order; none if it does not exist. A half-written last line is skipped.

    Raises BadRow naming file and line when a whole line is not JSON.
    """
    for _, row in _lines(Path(path)):
        yield row


def trim_after(path: str | Path, step: int) -> None:
    """Remove the rows whose "step" is greater than `step`, and a half-written last line, atomically.

    The kept rows stay byte for byte, so that a resumed run's file equals an uninterrupted one's.
    """
    path = Path(path)
    if path.exists():
        kept = (line for line, row in _lines(path) if row["step"] <= step)
        replace_file(path, b"".join(kept))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadRow(f"{path}:{number} is not a JSON row: repair or remove that line") from error
            yield line, row


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a whole file so that a reader, or a crash, sees either the old content or the new."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` in one step, once it was written without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
