"""Chat corpora: three forms of rows, bad lines named and counted, masks stored, docstrings of the library."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe.config import DataConfig
from moe.data.chat import BadLine, Chat, read_chats
from moe.data.corpus import SKIPPED, Corpus, prepare
from moe.data.docstrings import read_pairs
from moe.data.shards import TokenShards
from moe.data.sources import CHAT_SUFFIXES, list_files
from parallel.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
GOOD = {"messages": [ASKED, ANSWERED]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def settings(tmp_path: Path, **changes: Any) -> DataConfig:
    plain = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),),
        cache=str(tmp_path / "cache"),
        format="chat",
        packing="whole",
        sequence_length=40,
        validation_fraction=0.0,
        max_bad=1.0,
    )
    return dataclasses.replace(plain, **changes)


def read(config: DataConfig) -> list[Chat | BadLine]:
    return list(read_chats(list_files(config.paths, CHAT_SUFFIXES), config))


def texts(corpus: Corpus, shards: TokenShards) -> list[tuple[str, str]]:
    """Every chat, whole and what is learnt of it."""
    found = []
    for number, length in enumerate(shards.lengths):
        tokens, mask = shards.read(number, 0, int(length)), shards.read_mask(number, 0, int(length))
        both = (
            corpus.tokenizer.decode(t.tolist(), skip_special_tokens=False) for t in (tokens, tokens[mask])
        )
        found.append(tuple(both))
    return found  # type: ignore[return-value]


def pair(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def test_three_forms_give_messages(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    write(
        tmp_path / "rows.jsonl",
        {"messages": [system, ASKED, ANSWERED | {"name": None}], "domain": "law"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "domain": 7},
        " ",
        {"instruction": "Greet.", "input": "", "output": "Hi \ud800"},
        {
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
            "system": "Be brief.",
        },
    )
    found = read(settings(tmp_path))
    assert all(isinstance(chat, Chat) for chat in found)
    assert [(c.domain, c.name, c.messages) for c in found if isinstance(c, Chat)] == [
        ("law", "rows.jsonl:1", [system, ASKED, ANSWERED]),
        ("7", "rows.jsonl:2", pair("Add.\n\n1 2", "3")),
        ("rows", "rows.jsonl:4", pair("Greet.", "Hi ?")),
        ("rows", "rows.jsonl:5", [system, ASKED, ANSWERED]),
    ]


BAD = [
    ("{broken", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ([1], "wrong type"),
    ({"text": "no chat"}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": "Hi"}, "wrong type"),
    ({"messages": ["Hi"]}, "wrong type"),
    ({"conversations": ["Hi"]}, "wrong type"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "wrong type"),
    ({"instruction": 1, "output": "x"}, "wrong type"),
    ({"instruction": "x", "output": None}, "wrong type"),
    (GOOD | {"domain": []}, "wrong type"),
    ({"messages": [ASKED, {"role": "robot", "content": "x"}]}, "unknown role"),
    ({"messages": [ASKED, {"role": ["user"], "content": "x"}]}, "unknown role"),
    ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, "empty answer"),
    ({"messages": [ASKED]}, "no assistant turn"),
    ({"messages": [{"role": "user", "content": "a <eos> b"}, ANSWERED]}, "special token"),
    ({"messages": [{"role": "user", "content": "fail"}, ANSWERED]}, "template error"),
    ({"messages": [{"role": "user", "content": "".join(map(chr, range(200, 260)))}, ANSWERED]}, "too long"),
]


def test_bad_lines_are_counted_named_and_written_down(tmp_path: Path) -> None:
    """Training goes on with the rest."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role + ':' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 2, *(row for row, _ in BAD), *["{"] * 12, GOOD)
    said: list[str] = []
    config = settings(tmp_path, template=str(template))
    corpus = prepare(config, 300, said.append)
    assert texts(corpus, corpus.train) == [("user:Why?assistant:So.<eos>", "So.<eos>")] * 3
    written = (corpus.tokenizer_path.parent / SKIPPED).read_text().splitlines()
    lines = [json.loads(line) for line in written]
    assert [(line["line"], line["reason"]) for line in lines] == [
        *((number, reason) for number, (_, reason) in enumerate(BAD, start=3)),
        *((number, "not JSON") for number in range(22, 34)),
    ]
    assert {line["file"] for line in lines} == {str(path)}
    told = [each for each in said if each.startswith("left out, not JSON: line ")]
    assert len(told) == 10 and f"line 3 of {path}" in told[0]
    assert f"left out, too long: line 21 of {path} (" in "".join(said)
    summary = "31 of 34 lines were left out: 14 not JSON, 8 wrong type, 2 no messages, 2 unknown role, 1 "
    assert any(each.startswith(summary) for each in said)


def test_too_many_bad_lines_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 18, "{", {"messages": [ASKED]})
    prepare(settings(tmp_path, max_bad=0.1), 300)
    with pytest.raises(UserError) as caught:
        prepare(settings(tmp_path, max_bad=0.05), 300)
    assert str(caught.value).startswith(
        "`data.max_bad` must not be less than the share of bad lines, but 2 of 20 are bad, first line 19 of "
        f"{path} (not JSON: Expecting"
    )
    write(path, "{")
    with pytest.raises(UserError, match=r"1 of 1 are bad, first line 1 of"):
        prepare(settings(tmp_path), 300)
    write(path, "")
    with pytest.raises(UserError, match=r"^`data.paths` must lead to some chats, but holds none: name"):
        prepare(settings(tmp_path), 300)
    assert len(list(Path(settings(tmp_path).cache).iterdir())) == 1  # only what was whole


def test_what_belongs_to_the_fingerprint(tmp_path: Path) -> None:
    """A tokenizer's folder, its template, and the length that decides what is too long."""
    write(tmp_path / "rows.jsonl", GOOD)
    first = prepare(settings(tmp_path), 300)
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.json").write_bytes(first.tokenizer_path.read_bytes())
    given = settings(tmp_path, tokenizer=str(own))
    folders = {prepare(given, 300).tokenizer_path.parent, first.tokenizer_path.parent}
    assert prepare(dataclasses.replace(given, packing="bucket"), 300).tokenizer_path.parent in folders
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    folders |= {prepare(given, 300).tokenizer_path.parent}
    folders |= {prepare(dataclasses.replace(given, sequence_length=41), 300).tokenizer_path.parent}
    assert len(folders) == 4
    assert texts(prepare(given, 300), prepare(given, 300).train) == [("Why?So.<eos>", "So.<eos>")]


def test_a_folder_holds_chats_and_other_things(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    write(folder / "a.jsonl", GOOD)
    (folder / "README.md").write_text("not a chat")
    (chat,) = read(settings(tmp_path, paths=(str(folder),)))
    assert isinstance(chat, Chat) and chat.domain == "a"


MODULE = '''
class A:
    @property
    def good(self) -> int:
        """
        Give the
        number.

        More.
        """

        # why
        return 1

    def long(self):
        """Do much."""
        for a in b:
            pass
        {}

    def empty(self):
        """Nothing else."""

    def silent(self):
        return 2

    def one_line(self): "doc"; return 3
'''


def test_pairs_of_functions_and_docstrings() -> None:
    pairs = list(read_pairs(MODULE.format("\n        ".join(["c()"] * 200)), 100))
    question = "Describe this function.\n\n"
    good, long = pairs
    assert good == (4, question + "def good(self) -> int:\n    # why\n    return 1", "Give the number.")
    assert long[0] == 15 and long[2] == "Do much."
    assert long[1].startswith(question + "def long(self):\n    for a in b:\n        pass\n    c()\n")
    assert long[1].endswith("\n    c()\n    # ...") and 150 < len(long[1] + long[2]) <= 250
    assert list(read_pairs("def f(:", 100)) == []
    assert [pair[2] for pair in read_pairs(MODULE.format("c()"), 15)] == []


def test_docstrings_of_the_standard_library(tmp_path: Path) -> None:
    files = [file for file in list_files(["python-stdlib-docstrings"]) if file.domain in ("json", "email")]
    assert all(file.docstrings for file in files)
    config = settings(tmp_path, sequence_length=256)
    chats = [chat for chat in read_chats(files, config) if isinstance(chat, Chat)]
    assert chats == list(read_chats(files, config))
    assert {chat.domain for chat in chats} == {"json", "email"} and len(chats) > 100
    for chat in chats:
        function = chat.messages[0]["content"].split("\n\n", 1)[1]
        node = ast.parse(function + "\n").body[0] if not function.endswith("# ...") else None
        assert node is None or ast.get_docstring(node) is None  # type: ignore[arg-type]
