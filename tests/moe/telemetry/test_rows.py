"""Rows come back as written; a killed writer and a resume leave a clean file."""

import json
from pathlib import Path

import pytest

from moe.telemetry import rows
from moe.telemetry.rows import JsonLines, read_rows, replace_file, trim_after


def test_rows_are_appended_and_visible_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with JsonLines(path) as sink:
        sink.write({"step": 1, "loss": 2.5})
        assert list(read_rows(path)) == [{"step": 1, "loss": 2.5}]  # while the writer is still open
    with JsonLines(path) as sink:
        sink.write({"step": 2, "domains": {"code": [1, 2]}})
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with JsonLines(path) as sink:
        sink.write(
            {"step": 1, "loss": float("nan"), "bias": [float("inf"), 0.5], "deep": {"x": -float("inf")}}
        )
    text = path.read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "bias": [None, 0.5], "deep": {"x": None}}
    assert "NaN" not in text and "Infinity" not in text


def test_a_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2,"lo')
    assert list(read_rows(path)) == [{"step": 1}]
    path.write_bytes(b'{"step":1}\n{"step":2}')  # parses, but was not finished either
    assert list(read_rows(path)) == [{"step": 1}]


def test_a_broken_whole_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":1}\n{"step"\n{"step":3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not a JSON row"):
        list(read_rows(path))


def test_a_missing_file_has_no_rows_and_needs_no_trimming(tmp_path: Path) -> None:
    trim_after(tmp_path / "none.jsonl", 3)
    assert list(read_rows(tmp_path / "none.jsonl")) == []
    assert list(tmp_path.iterdir()) == []


def test_trimming_makes_a_resumed_file_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 2, 3, 4)]
    with JsonLines(straight) as sink:
        for row in rows:
            sink.write(row)
    with JsonLines(resumed) as sink:
        for row in rows[:4]:
            sink.write(row)
    with resumed.open("ab") as file:
        file.write(b'{"step":2,"torn')  # killed at step 4, resumed from the checkpoint of step 2
    trim_after(resumed, 2)
    assert [row["step"] for row in read_rows(resumed)] == [1, 2, 2]
    with JsonLines(resumed) as sink:
        for row in rows[3:]:
            sink.write(row)
    assert resumed.read_bytes() == straight.read_bytes()


def test_replacing_keeps_the_old_file_when_the_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: int) -> None:
        raise OSError("disk full")

    path = tmp_path / "report.html"
    replace_file(path, b"old")
    monkeypatch.setattr(rows.os, "fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
