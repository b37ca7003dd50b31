import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe.config import DataConfig
from moe.data import sources
from moe.data.sources import Document, list_files, read_documents
from parallel.errors import UserError


def read(*paths: Path | str, **settings: Any) -> list[Document]:
    config = DataConfig(paths=tuple(str(path) for path in paths), **settings)
    return list(read_documents(list_files(config.paths), config))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_rows(path: Path, *rows: object) -> Path:
    return write(path, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


def test_folder_is_read_in_order_with_its_folders_as_domains(tmp_path: Path) -> None:
    for name in ("b/y.txt", "b/deep/x.md", "a.py", "b/image.png", ".hidden.txt", ".git/z.txt", "empty.txt"):
        write(tmp_path / name, " \n" if name == "empty.txt" else f"text of {name}")
    assert [(d.name, d.domain, d.text) for d in read(tmp_path)] == [
        ("a.py", "a", "text of a.py"),
        ("b/deep/x.md", "b", "text of b/deep/x.md"),
        ("b/y.txt", "b", "text of b/y.txt"),
    ]


def test_glob_has_the_domains_of_its_folder_and_no_file_comes_twice(tmp_path: Path) -> None:
    for name in ("law/a.txt", "law/b.md", "code/c.txt"):
        write(tmp_path / name, name)
    found = [(d.name, d.domain) for d in read(tmp_path / "*/*.txt", tmp_path / "law")]
    assert found == [("code/c.txt", "code"), ("law/a.txt", "law"), ("b.md", "b")]


def test_explicit_file_may_have_any_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.tex", "text")
    assert read(path) == [Document("text", "notes", "notes.tex")]


def test_rows_have_their_own_text_and_domain(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "folder/rows.jsonl",
        {"body": "one", "kind": "law"},
        "",
        {"body": "two", "kind": 7},
        {"body": "three"},
        {"body": ""},
    )
    assert read(path.parent.parent, text_key="body", domain_key="kind") == [
        Document("one", "law", "folder/rows.jsonl:1"),
        Document("two", "7", "folder/rows.jsonl:3"),
        Document("three", "rows", "folder/rows.jsonl:4"),
    ]


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\xef\xbb\xbfcaf\xe9")
    write(tmp_path / "b.jsonl", rb'{"text": "half \ud800"}')
    assert [d.text for d in read(tmp_path)] == ["caf\ufffd", "half ?"]


def test_long_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 10)
    path = write(tmp_path / "long.txt", "".join(f"line {n}\n" for n in range(5)))
    assert [(d.name, d.text) for d in read(path)] == [
        ("long.txt", "line 0\nline 1\n"),
        ("long.txt#1", "line 2\nline 3\n"),
        ("long.txt#2", "line 4\n"),
    ]


def test_standard_library_is_packages_and_modules() -> None:
    files = list_files(["python-stdlib"])
    by_name = {file.name: file.domain for file in files}
    assert by_name["json/decoder.py"] == "json"
    assert by_name["argparse.py"] == "modules"
    assert by_name["xml/etree/ElementTree.py"] == "xml"
    assert len(set(by_name.values())) > 5
    assert sum(file.size for file in files) > 5_000_000
    folders = {folder for name in by_name for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def sentence(*paths: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        read(*paths)
    return str(caught.value)


def test_missing_path(tmp_path: Path) -> None:
    assert sentence(tmp_path / "none") == (
        f"`data.paths` must name files, folders or globs that exist, but {str(tmp_path / 'none')!r} leads to "
        "none: correct it, or use 'python-stdlib'"
    )
    os.mkfifo(tmp_path / "pipe.txt")  # would be waited for without end
    assert "leads to none" in sentence(tmp_path / "pipe.txt")


def test_no_text(tmp_path: Path) -> None:
    write(tmp_path / "blank.txt", "\n\n")
    assert sentence(tmp_path) == (
        f"`data.paths` must lead to some text, but {[str(tmp_path)]} holds none: "
        "name files with text, or folders of .txt, .md, .rst, .py, .jsonl files"
    )


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    good = {"text": "good"}
    path = write_rows(tmp_path / "a.jsonl", good, "{broken")
    assert sentence(path) == (
        f"`data.paths` must hold one JSON object on every line of a .jsonl file, but line 2 of {path} "
        "has none (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): "
        "correct or remove the line"
    )
    path = write_rows(tmp_path / "b.jsonl", good, good, [1])
    assert f"line 3 of {path} has none (it is a list): correct" in sentence(path)
    path = write_rows(tmp_path / "c.jsonl", good, {"body": "x", "id": 1})
    assert sentence(path) == (
        f"`data.text_key` must name the text of every JSONL row, but line 2 of {path} has no text under "
        "'text': correct the row, or use one of its keys ['body', 'id']"
    )
    path = write_rows(tmp_path / "d.jsonl", {"text": "x", "domain": ["a"]})
    assert sentence(path) == (
        f"`data.domain_key` must name a word or a number, but line 1 of {path} has list under 'domain': "
        "correct the row, or use another key"
    )
