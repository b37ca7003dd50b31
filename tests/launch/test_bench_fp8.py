"""FP8 beside bf16: two trainings on the same data, and a verdict."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from launch.bench import fp8
from launch.bench.fp8 import small_config
from moe.config import Fp8Config
from tests.small import small_run


def test_means_over_seeds_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tmp_path)
    train = replace(config.train, steps=8, fp8=Fp8Config(guard_every=2))
    layout = replace(config.layout, microbatches=2)
    monkeypatch.setattr(fp8, "small_config", lambda steps: replace(config, train=train, layout=layout))
    assert fp8.main(["--steps", "8", "--seeds", "2", "--json", str(tmp_path / "fp8.json")]) == 0
    assert "fp8 is within 0.25%" in capsys.readouterr().out
    result = json.loads((tmp_path / "fp8.json").read_text())
    first, second = result["rows"]
    assert (first["seed"], second["seed"]) == (train.seed, train.seed + 1)
    runs = first["losses"]
    assert {len(losses) for losses in runs.values()} == {8} and len({*map(tuple, runs.values())}) == 3
    assert all(losses[0] == pytest.approx(runs["bf16"][0], rel=1e-3) for losses in runs.values())  # one start
    assert first["fp8"] == fmean(runs["fp8"][-2:]) and second["losses"]["bf16"] != runs["bf16"]
    apart = [row["fp8"] / row["bf16"] - 1 for row in result["rows"]]
    assert result["differences"]["fp8"]["mean"] == fmean(apart) != 0
    assert result["differences"]["fp8"]["standard_error"] == pytest.approx(abs(apart[0] - apart[1]) / 2)
    assert 0.01 < result["fp8_error"] < 0.06 and result["holds"]
    monkeypatch.setattr(fp8, "LIMIT", abs(result["differences"]["fp8"]["mean"]) / 2)
    assert fp8.main(["--steps", "8", "--seeds", "2"]) == 1
    assert "beyond" in capsys.readouterr().out


def test_it_is_recipe_tiny_on_one_rank() -> None:
    config = small_config(200)
    assert (config.train.steps, config.layout.ep, config.layout.dp, config.model.num_layers) == (200, 1, 1, 3)
