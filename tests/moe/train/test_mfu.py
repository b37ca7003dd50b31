"""The share of the machines' peak that a step reaches, where the peak is known."""

import json
from pathlib import Path

import pytest

from moe.config import ClusterConfig, DataConfig, RunConfig, TuneConfig
from moe.train.record import METRICS, Recorder
from moe.train.step import StepResult
from tests.released import V2_LITE


@pytest.mark.parametrize(
    ("peak", "tune", "expected"),
    [
        (312.0, TuneConfig(), 0.30),
        (None, TuneConfig(), None),
        (312.0, TuneConfig(method="lora"), 0.21),  # 11.50 GFLOP: no gradients of weights
        (312.0, TuneConfig(frozen=("head",)), 0.2922),
    ],
)
def test_mfu_of_v2_lite_on_eight_ranks(
    tmp_path: Path, peak: float | None, tune: TuneConfig, expected: float | None
) -> None:
    config = RunConfig(
        model=V2_LITE,
        data=DataConfig(sequence_length=4096),
        cluster=ClusterConfig(peak_tflops=peak),
        tune=tune,
    )
    recorder = Recorder(tmp_path, config, (), 0, 8)
    losses = dict(loss=1.0, mtp_loss=0.0, auxiliary_loss=0.0, grad_norm=1.0, learning_rate=1.0)
    result = StepResult(tokens=91_200, seconds=2.0, layers={}, timeline=None, routing={}, **losses)
    recorder.step(1, 91_200, result)
    recorder.close()
    found = json.loads((tmp_path / METRICS).read_text())["mfu"]
    # 45.6 thousand tokens a second at 16.41 GFLOP each, on 8 x 312 TFLOP/s
    assert found == (None if expected is None else pytest.approx(expected, rel=0.01))
