"""What watching costs: shares of a step of a small model, with what is sampled counted as often as it is."""

from pathlib import Path

import pytest

from launch.bench import telemetry
from tests.small import small_run


def test_parts_are_shares_of_the_step(tmp_path: Path) -> None:
    result = telemetry.measure(small_run(tmp_path), rounds=1)
    *parts, together = result["rows"]
    assert [row["part"] for row in parts] == ["router signals", "counts", "rows"]
    assert all(row["seconds"] > 0 for row in parts)
    assert together["seconds"] == pytest.approx(sum(row["seconds"] for row in parts))
    assert together["share"] == pytest.approx(together["seconds"] / result["step_seconds"])
    assert together["share"] < 1 and (result["layers"], result["experts"]) == (2, 8)


def test_a_sample_counts_as_often_as_it_is_taken(tmp_path: Path) -> None:
    found = {"step": 2.0, "signals": 0.1, "rows plain": 0.1, "rows sampled": 0.1}
    found |= {"counts plain": 0.2, "counts sampled": 0.7}
    rows = telemetry.result_of(small_run(tmp_path), 2, found)["rows"]
    assert [row["share"] for row in rows] == pytest.approx([0.05, 0.125, 0.05, 0.225])
