"""What a resumed run's recorder keeps of a killed attempt."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe.telemetry.rows import read_rows
from moe.train.counting import LayerCounts
from moe.train.record import Recorder
from moe.train.step import StepResult
from tests.small import small_run

NUM_EXPERTS = 8


def a_step(counts: list[int]) -> StepResult:
    layer: dict[str, Any] = dict(
        rank_rows=torch.tensor([[sum(counts)]]),
        links=torch.tensor([sum(counts), 0, 0]),
        gates=torch.ones(NUM_EXPERTS, dtype=torch.float64),
        max_vio_microbatch=(0.0, 0.0),
        logit_rms=1.0,
        logit_max=2.0,
        margin=None,
        group_limited=0.0,
        bias=torch.zeros(NUM_EXPERTS),
        domains=None,
        pairs=None,
        expert_seconds=None,
    )
    losses = dict(loss=2.0, mtp_loss=0.0, auxiliary_loss=0.0, grad_norm=1.0, learning_rate=1.0)
    counted = LayerCounts(counts=torch.tensor(counts), **layer)
    return StepResult(tokens=8, seconds=1.0, layers={"1": counted}, timeline=None, routing={}, **losses)


def test_a_resumed_recorder_is_where_it_was(tmp_path: Path) -> None:
    """Window and alarms know the steps before; what was written of later ones is gone."""
    config = small_run(tmp_path)
    limits = replace(config.telemetry.alarms, dead_steps=4, max_vio=None)
    config = replace(config, telemetry=replace(config.telemetry, window=3, alarms=limits))

    def uneven(step: int) -> StepResult:
        return a_step([0, *(9 + step * expert for expert in range(7))])

    recorder = Recorder(tmp_path, config, (), 0, 1)
    told = [recorder.step(step, 8 * step, uneven(step))[1] for step in range(1, 7)]
    assert [bool(alarms) for alarms in told] == [False, False, False, True, False, False]
    whole = list(read_rows(tmp_path / "expert_load.jsonl"))
    for step in (2, 5):
        (tmp_path / "routing" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "timeline.json").write_text(json.dumps({"step": 5}))
    recorder = Recorder(tmp_path, config, (), 3, 1)
    assert [folder.name for folder in (tmp_path / "routing").iterdir()] == ["step-2"]
    assert not (tmp_path / "timeline.json").exists()
    assert list(read_rows(tmp_path / "alarms.jsonl")) == []
    told = [recorder.step(step, 8 * step, uneven(step))[1] for step in range(4, 7)]
    assert [bool(alarms) for alarms in told] == [True, False, False]
    assert list(read_rows(tmp_path / "expert_load.jsonl")) == whole
