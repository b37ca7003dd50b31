"""Runs that go on after their end, and runs that are repeated to the bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe.config import RunConfig
from moe.train.loop import train
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from tests.small import small_run

TIMED = ("tokens_per_second", "step_seconds", "memory_peak_bytes", "mfu")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = small_run(tmp_path)
    return replace(config, train=replace(config.train, steps=2, eval_every=2, save_every=2))


def rows(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMED} for row in lines]


def test_a_finished_run_goes_on_under_a_schedule_of_its_own(config: RunConfig, tmp_path: Path) -> None:
    """A tenth of the peak rate after a decay to the end, with a warmup again."""
    run = tmp_path / "run"
    run.mkdir()
    assert train(config, run) == 0
    assert {row["domain"] for row in rows(run) if "perplexity" in row} == {"all", "d0", "d1", "d2"}
    rate = config.optim.lr / 10
    later = replace(config, train=replace(config.train, steps=6))
    ahead = replace(later, optim=replace(config.optim, begin_step=3, lr=rate))
    with pytest.raises(UserError, match="at step 2, but is 3: use at most 2"):
        train(ahead, run)
    assert train(replace(later, optim=replace(ahead.optim, begin_step=2)), run) == 0
    rates = [row["lr"] for row in rows(run) if "lr" in row]
    assert len(rates) == 6 and rates[2:4] == pytest.approx([rate / 2, rate])  # two steps of warmup


def test_two_runs_are_equal_to_the_bit(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, train=replace(config.train, deterministic=True))
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        run.mkdir()
        assert train(config, run) == 0
        assert json.loads((run / "environment.json").read_text())["seed"] == config.train.seed
    assert rows(runs[0]) == rows(runs[1])
    one, two = (open_checkpoint(run / "checkpoints" / "step-2") for run in runs)
    assert one.digest == two.digest
