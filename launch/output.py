"""Results for machines, of every command that has `--json FILE`. No torch."""

import json
from pathlib import Path
from typing import Any

from moe.telemetry.rows import finite, replace_file
from parallel.errors import UserError


def check_json(path: Path | None) -> None:
    """Raise UserError where the file could not be written, before anything is measured."""
    if path and not path.resolve().parent.is_dir():
        raise UserError(f"`--json` must lie in an existing folder, but {path} does not: make it first")


def check_out(path: Path) -> None:
    """Raise UserError where `--out` could not be a file, before anything is made."""
    if not path.resolve().parent.is_dir():
        raise UserError(f"`--out` must lie in an existing folder, but {path} does not: make it first")
    if path.is_dir():
        raise UserError(f"`--out` must be a file, but {path} is a folder: add a name")


def write_json(path: Path | None, result: Any) -> None:
    """Write a result, if it was asked for; NaN and infinities become null."""
    if path:
        replace_file(path, json.dumps(finite(result), indent=2, allow_nan=False).encode())
