"""The page of the dashboard: one template, served live or as one file that opens offline. No torch."""

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.dashboard.view import as_json
from moe.telemetry.rows import replace_file
from parallel.errors import UserError

FOLDER = Path(__file__).parent
TEMPLATE, STYLE = "page.html", "page.css"
SCRIPTS = (  # in this order, as one script
    *("data.js", "scale.js", "draw.js", "state.js", "curves.js", "heat.js", "ranks.js", "panels.js"),
    "main.js",
)
_MARKER = re.compile(r"/\*(STYLE|SCRIPT|EXPORT)\*/")


def page(views: Sequence[Mapping[str, Any]] | None = None) -> bytes:
    """The page with these views inside; None: it asks the server that it came from."""
    parts = {
        "STYLE": _asset(STYLE),
        "SCRIPT": "\n".join(map(_asset, SCRIPTS)),
        "EXPORT": _inside_script(None if views is None else {"views": _packed(views)}),
    }
    return _MARKER.sub(lambda found: parts[found[1]], _asset(TEMPLATE)).encode()


def check_export(path: Path | None) -> None:
    """Raise UserError where the file could not be written, before runs are read."""
    if path and not path.resolve().parent.is_dir():
        raise UserError(f"`--export` must lie in an existing folder, but {path} does not: make it first")
    if path and path.is_dir():
        raise UserError(
            f"`--export` must be a file, but {path} is a folder: add a name, as in {path}/run.html"
        )


def write_export(path: Path, views: Sequence[Mapping[str, Any]]) -> None:
    """Write the page with these views, whole or not at all."""
    try:
        replace_file(path, page(views))
    except OSError as error:
        raise UserError(f"`--export` cannot write {path} ({error.strerror}): choose another file") from None


def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _packed(views: Sequence[Mapping[str, Any]]) -> str:
    """The same views always give the same text."""
    return base64.b64encode(gzip.compress(as_json(list(views)), compresslevel=6, mtime=0)).decode()


def _inside_script(value: Any) -> str:
    """JSON that no HTML parser takes for the end of its element, or for a comment."""
    return json.dumps(value).replace("<", "\\u003c")
