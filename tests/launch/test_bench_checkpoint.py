"""What a save costs: measured on a small model, in the background and waited for."""

from pathlib import Path

import pytest

from launch.bench import checkpoint
from parallel.errors import UserError
from tests.small import small_run


def test_rows_tell_stall_and_cost(tmp_path: Path) -> None:
    result = checkpoint.measure(small_run(tmp_path), every=2, rounds=2)
    none, background, waited = result["rows"]
    assert [row["save"] for row in result["rows"]] == ["none", "background", "waited"]
    assert none["stall_seconds"] == none["cost_share"] == 0.0
    assert background["stall_seconds"] > 0
    assert waited["stall_share"] == pytest.approx(waited["stall_seconds"] / (2 * none["step_seconds"]))
    assert result["bytes"] > 12 * 10_000  # weights and two moments in fp32


def test_mistakes_cost_no_time() -> None:
    with pytest.raises(UserError, match=r"^`--every` must be at least 1, but is 0: use 20"):
        checkpoint.main(["--every", "0"])
