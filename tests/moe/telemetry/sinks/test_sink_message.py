"""The names and numbers that sinks are told."""

import math

import numpy as np
import pytest

from moe.telemetry.sinks.message import Evaluation, Step, picture
from tests.moe.telemetry.sinks.told import EVALUATION, loads, metrics


def test_a_step_has_tidy_names() -> None:
    named = Step.of(metrics(11, loss=math.nan), loads(11)).scalars()
    assert named["train/tokens_per_second"] == 64 and math.isnan(named["train/loss"])
    assert "train/mfu" not in named and "train/step" not in named and "experts/row_bytes/mean" not in named
    assert [named[f"experts/max_vio/layer-{layer}"] for layer in (1, 2, "mtp0")] == [0.25, 1.25, 2.25]
    assert named["experts/max_vio/mean"] == 1.25
    assert named["experts/rank_share/layer-2"] == 1.5
    assert named["experts/bias_spread/layer-2"] == 1.0
    assert [named[f"traffic/{link}_bytes"] for link in ("kept", "nvlink", "network")] == [240, 180, 60]


def test_single_layers_and_experts_come_now_and_then() -> None:
    layers = [n for n in range(1, 31) if "experts/dead/layer-1" in Step.of(metrics(n), loads(n)).scalars()]
    assert layers == [1, 11, 21]
    assert [n for n in range(1, 300) if Step.of(metrics(n), loads(n)).loads is not None] == [1, 101, 201]


def test_rows_of_older_runs_hold_less() -> None:
    bare = Step.of({"step": 1, "loss": 2.0}, [{"layer": 1, "max_vio": 0.5}, {"layer": 2, "bias": None}])
    assert bare.scalars() == {
        "train/loss": 2.0,
        "experts/max_vio/layer-1": 0.5,
        "experts/max_vio/mean": 0.5,
    }
    assert bare.loads is None and Step.of({"step": 1}, []).scalars() == {}


def test_an_evaluation_is_named_by_domain() -> None:
    named = Evaluation.of(EVALUATION).scalars()
    assert named == {"eval/loss/wiki?en": 1.5, "eval/perplexity/wiki?en": 4.4817}


def test_the_picture_tells_dead_even_and_busy_apart() -> None:
    step = Step.of(metrics(1), loads(1))
    assert step.loads is not None and step.loads[0] == pytest.approx([1, 0, 2, 1])
    image = picture(step.loads)
    assert image.shape == (3 * 12, 4 * 192, 3) and image.dtype == np.uint8
    cells = image[6::12, 96::192].tolist()
    assert cells[0] == [[255] * 3, [0] * 3, [213, 94, 0], [255] * 3] and cells[2][0] == [213, 94, 0]
    assert picture(np.array([[0.5, 1.5]], np.float32))[0, ::384].tolist() == [
        [127, 184, 216],
        [234, 174, 127],
    ]
