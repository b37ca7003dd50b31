"""Where text comes from: `DataConfig.paths` -> files -> documents, in one fixed order. No torch.

Listing (names, sizes, times) is apart from reading, so that a finished corpus can be recognised
without opening a file. Reading is a stream: one document is held at a time, and a long text file
is several documents.
"""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from moe.config import DataConfig
from parallel.errors import UserError

STANDARD_LIBRARY = "python-stdlib"
DOCSTRINGS = "python-stdlib-docstrings"
STANDARD_LIBRARY_EXCLUDED = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
CHAT_SUFFIXES = (".jsonl",)
PIECE_CHARACTERS = 1 << 22  # a longer text file is cut after the line that passes this


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read. `name` is its path below the given root, `modified` its mtime in ns.

    `docstrings`: it is a module whose functions are to be read as chats.
    """

    path: Path
    name: str
    domain: str
    size: int
    modified: int
    docstrings: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """One text, never blank. `name` decides between training and validation; it holds no machine path."""

    text: str
    domain: str
    name: str


def list_files(paths: Sequence[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[SourceFile]:
    """Every file behind `paths`, each once: in the order of `paths`, then by name.

    A path is `python-stdlib`, `python-stdlib-docstrings`, a file, a folder (read recursively, `suffixes`
    only; hidden entries and links to folders are passed over) or a glob.
    Raises `UserError` when one of them leads nowhere.
    """
    files: dict[Path, SourceFile] = {}
    for path in paths:
        if path in (STANDARD_LIBRARY, DOCSTRINGS):
            found = _standard_library(docstrings=path == DOCSTRINGS)
        else:
            found = _behind(path, suffixes)
        for file in found:
            files.setdefault(file.path, file)
    return list(files.values())


def read_documents(files: Sequence[SourceFile], config: DataConfig) -> Iterator[Document]:
    """The documents of the files in order; blank ones are left out.

    Raises `UserError` for a file that cannot be read, a bad JSONL row, or when there is no text at all.
    """
    empty = True
    for file in files:
        try:
            with file.path.open(encoding="utf-8-sig", errors="replace") as stream:
                is_rows = file.path.suffix.lower() == ".jsonl"
                for document in _rows(stream, file, config) if is_rows else _pieces(stream, file):
                    if document.text.strip():
                        empty = False
                        yield document
        except OSError as error:
            refuse_file(error)
    if empty:
        raise UserError(
            f"`data.paths` must lead to some text, but {list(config.paths)} holds none: "
            f"name files with text, or folders of {', '.join(SUFFIXES)} files"
        )


def _standard_library(docstrings: bool) -> Iterator[SourceFile]:
    """The running Python's own modules; a domain per package, and `modules` for the single files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, (".py",), STANDARD_LIBRARY_EXCLUDED):
        package = path.relative_to(root).parts[0]
        if path.parent == root or (root / package / "__init__.py").is_file():
            file = _source_file(path, root, domain="modules" if path.parent == root else package)
            yield replace(file, docstrings=docstrings)


def _behind(path: str, suffixes: tuple[str, ...]) -> Iterator[SourceFile]:
    """The files of one file, folder or glob; the folders directly below its root are the domains."""
    given = Path(os.path.abspath(os.path.expanduser(path)))
    if given.exists():
        root, matches = given if given.is_dir() else given.parent, [given]
    else:
        root = next(parent for parent in given.parents if not glob.has_magic(str(parent)))
        matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))
    matches = [match for match in matches if match.is_dir() or match.is_file()]
    if not matches:
        raise UserError(
            f"`data.paths` must name files, folders or globs that exist, but {path!r} leads to none: "
            f"correct it, or use {STANDARD_LIBRARY!r}"
        )
    for match in matches:
        for file in _walk(match, suffixes) if match.is_dir() else [match]:
            below = file.relative_to(root)
            yield _source_file(file, root, domain=below.parts[0] if len(below.parts) > 1 else below.stem)


def _walk(root: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset()) -> list[Path]:
    """The files with these suffixes in and below a folder, sorted."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse_file):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        visible = (Path(folder, name) for name in names if not name.startswith("."))
        found += (path for path in visible if path.suffix.lower() in suffixes and path.is_file())
    return sorted(found)


def _source_file(path: Path, root: Path, domain: str) -> SourceFile:
    status = path.stat()
    name = path.relative_to(root).as_posix()
    return SourceFile(path, name, domain, size=status.st_size, modified=status.st_mtime_ns)


def refuse_file(error: OSError) -> NoReturn:
    """Raise the `UserError` for a file or folder that cannot be read."""
    raise UserError(
        f"`data.paths` must lead to readable files, but {error.filename} is not ({error.strerror}): "
        "change its permissions or leave it out"
    ) from error


def _pieces(stream: TextIO, file: SourceFile) -> Iterator[Document]:
    """The text of one file, cut at line ends where it is long."""
    number = 0
    while text := stream.read(PIECE_CHARACTERS):
        text += stream.readline(PIECE_CHARACTERS)
        yield Document(text, file.domain, f"{file.name}#{number}" if number else file.name)
        number += 1


def _rows(stream: TextIO, file: SourceFile, config: DataConfig) -> Iterator[Document]:
    """One document per JSONL row that is not empty."""
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        where = f"line {number} of {file.path}"
        row = _parse(line, where)
        text, domain = row.get(config.text_key), row.get(config.domain_key)
        if not isinstance(text, str):
            raise UserError(
                f"`data.text_key` must name the text of every JSONL row, but {where} has no text under "
                f"{config.text_key!r}: correct the row, or use one of its keys {sorted(row)}"
            )
        if not isinstance(domain, str | int | None):
            raise UserError(
                f"`data.domain_key` must name a word or a number, but {where} has {type(domain).__name__} "
                f"under {config.domain_key!r}: correct the row, or use another key"
            )
        named = file.path.stem if domain in (None, "") else str(domain)
        yield Document(without_surrogates(text), without_surrogates(named), f"{file.name}:{number}")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter from brackets without end
        reason = str(error)
    else:
        if isinstance(row, dict):
            return row
        reason = f"it is a {type(row).__name__}"
    raise UserError(
        f"`data.paths` must hold one JSON object on every line of a .jsonl file, but {where} has none "
        f"({reason}): correct or remove the line"
    )


def without_surrogates(text: str) -> str:
    """JSON may escape half a character, which no tokenizer and no UTF-8 file can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
