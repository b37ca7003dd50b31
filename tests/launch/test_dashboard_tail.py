"""Files that are read while they grow, are replaced or vanish."""

import json
from pathlib import Path

from launch.dashboard.tail import Kept, Tail
from moe.telemetry.rows import replace_file


def test_rows_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    assert list(tail.poll()) == []
    with path.open("w") as file:
        for text, rows in [('{"a": 1}\n{"a"', [1]), ("", []), (": 2}", []), ("\n", [2]), ('{"a": 3}\n', [3])]:
            file.write(text)
            file.flush()
            assert [row["a"] for row in tail.poll()] == rows
    assert tail.epoch == 0


def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    tail = Tail(path)
    assert len(list(tail.poll())) == 2
    for content in (
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 7}\n{"a": 8}\n{"a": 9}\n',
    ):  # as long as before, and longer
        for _ in range(2):  # so that a file system would give the first one's number again
            replace_file(path, content)
        assert list(tail.poll()) == list(map(json.loads, content.splitlines()))
    assert tail.epoch == 2
    path.write_text('{"a": 1}\n')  # in place
    assert [row["a"] for row in tail.poll()] == [1] and tail.epoch == 3
    tail.close()


def test_a_small_file_is_kept_while_it_stays(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    parsed = []

    def parse(text: str) -> object:
        parsed.append(text)
        return json.loads(text)

    kept = Kept(path, parse, None)
    assert kept.get() is None
    replace_file(path, b"[1]")
    assert kept.get() == [1] == kept.get() and parsed == ["[1]"]
    replace_file(path, b"[2]")
    assert kept.get() == [2]
    path.unlink()
    assert kept.get() is None
