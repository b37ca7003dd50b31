"""What MLflow's own client reads back of a run."""

import logging
from pathlib import Path

import pytest

from tests.moe.telemetry.sinks.told import ALARM, CONFIG, EVALUATION, loads, metrics, outlets

pytest.importorskip("mlflow")


def test_a_run_and_its_resume_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = tmp_path / "probe-run"
    for steps in (range(1, 13), range(11, 14)):
        sinks = outlets(run, "mlflow")
        for step in steps:
            sinks.step(metrics(step), loads(step))
        sinks.evaluation(EVALUATION)
        sinks.alarm(ALARM)
        sinks.close()
        monkeypatch.setitem(CONFIG["train"], "steps", 9)  # a resume may; a parameter there may not
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("probe").experiment_id])
    assert found.info.run_id == (run / "mlflow_id.txt").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("probe-run", "FINISHED")
    assert found.data.params["model.num_experts"] == "4" and found.data.params["train.steps"] == "3"
    assert len(found.data.params["data.paths"]) == 500
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(n, 1 / n) for n in (*range(1, 13), 11, 12, 13)]
    layer = client.get_metric_history(found.info.run_id, "experts/max_vio/layer-mtp0")
    assert [(m.step, m.value) for m in layer] == [(1, 2.25), (11, 2.25), (11, 2.25)]
    assert found.data.metrics["eval/loss/wiki_en"] == 1.5
    assert client.get_metric_history(found.info.run_id, "alarms/dead_expert")[0].step == 2
    assert found.data.tags["alarm.dead_expert"] == "step 2: expert 1 died"
    assert not (tmp_path / "home").exists()


def test_a_run_that_another_server_knew_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "mlflow_id.txt").write_text("0" * 32)
    outlets(tmp_path, "mlflow").close()
    kept = (tmp_path / "mlflow_id.txt").read_text().strip()
    assert kept != "0" * 32 and list((tmp_path / "mlruns").glob(f"*/{kept}/meta.yaml"))
