"""What W&B keeps of a run without network and account, from its own file."""

import json
import struct
import time
from pathlib import Path

import pytest

from moe.telemetry.sinks.to_wandb import WandbSink
from tests.moe.telemetry.sinks.told import ALARM, EVALUATION, loads, metrics, outlets

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
BLOCK = 32768  # LevelDB's log: records do not cross blocks, long ones are continued


@pytest.fixture(autouse=True)
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody without an account."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def records(file: Path) -> list:
    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            found.append(pb.Record.FromString(whole))
            whole = b""
    return found


def finished(file: Path) -> list:
    """The records of a finished run: W&B's own process writes the last of them after `finish` returned."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = records(file)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise TimeoutError


def test_a_run_is_kept_offline_and_its_resume_is_the_same_run(tmp_path: Path) -> None:
    run, ids = tmp_path / "probe-run", []
    for steps in (range(1, 13), range(11, 14)):
        sinks = outlets(run, "wandb")
        for step in steps:
            sinks.step(metrics(step), loads(step))
        sinks.evaluation(EVALUATION)
        sinks.alarm(ALARM)
        sinks.close()
        (file,) = set(run.glob("wandb/offline-run-*/*.wandb")) - {file for file, _ in ids}
        ids.append((file, finished(file)))
    rows, facts, summary = [], [], {}
    for _, found in ids:
        for record in found:
            if record.HasField("run"):
                facts.append((record.run.run_id, record.run.project, record.run.display_name))
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    assert set(facts) == {((run / "wandb_id.txt").read_text().strip(), "probe", "probe-run")}
    assert config["model"] == {"num_experts": 4}
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(n, pytest.approx(1 / n)) for n in (*range(1, 13), 11, 12, 13)]
    assert [row["experts/dead/layer-1"] for row in rows if "experts/dead/layer-1" in row] == [1, 1, 1]
    assert [row["eval/loss/wiki?en"] for row in rows if "eval/loss/wiki?en" in row] == [1.5, 1.5]
    assert sum("image-file" in json.dumps(row) for row in rows) == 1
    assert summary["alarms/dead_expert"] == "step 2: expert 1 died"


def test_online_without_a_key_is_refused_rather_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(WandbSink, "step", None)  # not reached
    outlets(tmp_path, "wandb").close()
    assert "WANDB_MODE is online, but there is no API key" in caplog.text
