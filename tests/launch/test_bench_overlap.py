"""`bench overlap` end to end on two hosts, at a size at which its figures mean nothing but their shape."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.bench import overlap
from launch.bench.overlap import Setup
from parallel.errors import UserError

NEEDS = "hosts are network namespaces: Linux, root and iproute2"
can_make_hosts = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("tc") is not None


@pytest.mark.skipif(not can_make_hosts, reason=NEEDS)
def test_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(overlap, "MODEL", [*overlap.MODEL, "data.sequence_length=16"])
    monkeypatch.setattr(overlap, "SETUPS", (Setup("1f1b", 2, 1, 1), Setup("dualpipe", 4, 2, 1)))
    monkeypatch.setattr(overlap, "PAUSE_SECONDS", 0.001)
    path = tmp_path / "overlap.json"
    words = ["--rounds", "1", "--rates", "2", "--microbatches", "4", "--json", str(path)]
    assert main(["bench", "overlap", *words]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["schedule"] for row in rows] == ["1f1b"] * 2 + ["dualpipe"] * 2
    assert [row["paired"] for row in rows] == [0.75] * 2 + [0.25] * 2
    assert all(rows[index + 1]["link_mbit"] == 2 * rows[index]["link_mbit"] for index in (0, 2))
    names = ("compute", "exchange", "serial", "overlapped")
    assert all(row[f"{name}_seconds"] > 0 for row in rows for name in names)
    for row in rows:
        least = min(row["compute_seconds"], row["exchange_seconds"]) * row["paired"]
        hidden = row["compute_seconds"] + row["exchange_seconds"] - row["overlapped_seconds"]
        assert row["hidden_share"] == pytest.approx(hidden / least)
    assert capsys.readouterr().out.count("hidden") == 4


def test_it_says_who_may_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="only root may make"):
        overlap.main([])


def test_the_link_has_the_delay_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def refuse(count: int, rate_mbit: float, delay_ms: float) -> None:
        asked.append(delay_ms)
        raise UserError("enough")

    monkeypatch.setattr(overlap, "hosts", refuse)
    for words in ([], ["--delay", "3"]):
        with pytest.raises(UserError, match="enough"):
            overlap.main(words)
    assert asked == [0, 3]
    with pytest.raises(UserError, match="`--delay` must be at least 0, but is -1: use 0"):
        overlap.main(["--delay", "-1"])
