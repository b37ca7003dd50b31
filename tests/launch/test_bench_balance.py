"""The selection bias at work: real text, one skewed start, with and without it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.bench import balance
from launch.bench.balance import small_config
from moe.config import RunConfig
from parallel.errors import UserError


def smaller(steps: int) -> RunConfig:
    config = small_config(steps)
    model = replace(config.model, num_layers=3, hidden_size=64, intermediate_size=64)
    return replace(config, model=model, train=replace(config.train, batch_size=4))


def test_the_bias_evens_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tail MaxVio with the bias is at most a third of the one without it."""
    monkeypatch.setattr(balance, "small_config", smaller)
    assert balance.main(["--steps", "60", "--json", str(tmp_path / "balance.json")]) == 0
    result = json.loads((tmp_path / "balance.json").read_text())
    with_bias, without = result["rows"]
    assert (with_bias["bias"], without["bias"]) == ("update", "none")
    assert with_bias["first"] == without["first"] > 2  # the same skewed start
    assert without["tail"] > 0.5  # which does not even out by itself
    assert result["ratio"] == with_bias["tail"] / without["tail"] < 1 / 3
    assert "tail with the bias / without" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "`--steps` must be at least 1, but is 0: "),
        (
            ["--json", "nowhere/x.json"],
            "`--json` must lie in an existing folder, but nowhere/x.json does not: ",
        ),
    ],
)
def test_mistakes_cost_no_time(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        balance.main(arguments)
