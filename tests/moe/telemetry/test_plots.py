"""The pictures: what is drawn where, at the sizes of a tiny model, of V2-Lite and of V3."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from moe.telemetry import plots
from moe.telemetry.plots import plot_expert_load, plot_loss
from moe.telemetry.tables import from_lines


def draw(rows: list[dict[str, Any]], path: Path, window: int | None = None) -> None:
    """The picture of rows of expert_load.jsonl, its shares those of the last `window` steps."""
    load = from_lines("".join(json.dumps(row) + "\n" for row in rows).encode())
    plot_expert_load(load, load.after(load.last - (window or load.last)), path)


def load_rows(num_layers: int, num_experts: int, steps: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    layers = [*range(1, num_layers), "mtp0"]
    return [
        {
            "step": step,
            "layer": layer,
            "counts": rng.integers(1, 9, num_experts).tolist(),
            "max_vio": 1 / step,
        }
        for step in range(1, steps + 1)
        for layer in layers
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, before it is rendered."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


@pytest.mark.parametrize(("num_layers", "num_experts"), [(5, 16), (27, 64), (61, 256)])
def test_expert_load_becomes_a_picture(num_layers: int, num_experts: int, tmp_path: Path) -> None:
    path = tmp_path / "expert_load.png"
    draw(load_rows(num_layers, num_experts, 2), path, 1)
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width >= 2 * num_experts * 3 and height >= 10 * num_layers  # pixels enough for every cell
    assert [p.name for p in tmp_path.iterdir()] == ["expert_load.png"]


def test_the_heatmap_shows_shares_of_the_last_window(figures: list[Figure], tmp_path: Path) -> None:
    rows = load_rows(3, 4, 5)
    rows += [{"step": 6, "layer": layer, "counts": [4, 2, 0, 2], "max_vio": 1.0} for layer in (1, 2)]
    rows += [{"step": 7, "layer": layer, "counts": [0, 2, 0, 6], "max_vio": 2.0} for layer in (1, 2)]
    draw([row for row in rows if row["layer"] != "mtp0"], tmp_path / "x.png", 2)
    left = figures[0].axes[0]
    shares = left.images[0].get_array()
    assert shares is not None and np.ma.filled(shares, -1).tolist() == [[1.0, 1.0, -1.0, 2.0]] * 2  # -1: dead
    assert left.images[0].get_clim() == (0.0, 2.0)  # symmetric about an even load
    assert [label.get_text() for label in left.get_yticklabels()] == ["2", "1"]
    assert "last 2 steps" in left.get_title(loc="left")


def test_max_vio_has_a_line_per_layer_and_their_mean(figures: list[Figure], tmp_path: Path) -> None:
    rows = [
        {"step": step, "layer": layer, "counts": [1, 1], "max_vio": value}
        for step in (1, 2)
        for layer, value in ((1, 0.2), ("mtp0", 0.6))
    ]
    draw(rows, tmp_path / "x.png")
    lines = {line.get_label(): line for line in figures[0].axes[1].lines}
    assert list(lines) == ["layer 1", "layer mtp0", "mean over layers"]
    assert np.asarray(lines["layer mtp0"].get_xdata()).tolist() == [1, 2]
    assert np.asarray(lines["mean over layers"].get_ydata()) == pytest.approx([0.4, 0.4])


def test_nothing_routed_is_drawn_too(tmp_path: Path) -> None:
    rows = [{"step": 1, "layer": 0, "counts": [0, 0], "max_vio": 0.0}]
    draw(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_loss_shows_training_validation_and_learning_rate(figures: list[Figure], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": s, "tokens": 10 * s, "loss": None if s == 3 else 5.0, "lr": 0.1 * s} for s in range(1, 9)
    ]
    rows += [{"step": 8, "eval_loss": 4.5, "domain": "all"}, {"step": 8, "eval_loss": 9.0, "domain": "code"}]
    plot_loss(rows, tmp_path / "x.png")
    top, bottom = figures[0].axes
    raw, smoothed, validation = (np.asarray(line.get_ydata()) for line in top.lines)
    assert np.isnan(raw[2]) and smoothed == pytest.approx([5.0] * 8)  # the mean passes over a NaN
    assert validation.tolist() == [4.5]  # the total only
    assert np.asarray(bottom.lines[0].get_ydata()) == pytest.approx([0.1 * s for s in range(1, 9)])
    assert "nats" in top.get_ylabel() and "step" in bottom.get_xlabel()


def test_smoothing_follows_a_trend_without_lag() -> None:
    line = np.arange(100.0)
    assert plots._smooth(line)[3:-3] == pytest.approx(line[3:-3])


@pytest.mark.parametrize("length", range(6))
def test_smoothing_keeps_the_length_of_a_short_series(length: int) -> None:
    assert plots._smooth(np.ones(length)).tolist() == [1.0] * length


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, moe.telemetry.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
