"""What TensorBoard would read of a run, from the event files themselves."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.moe.telemetry.sinks.told import ALARM, EVALUATION, loads, metrics, outlets

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def events(folder: Path) -> Iterator:
    """Every event of a folder's files in order; a record is length, checksum, bytes, checksum."""
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length


def test_a_run_and_its_resume_are_read_back(tmp_path: Path) -> None:
    for steps in (range(1, 13), range(11, 14)):  # the first attempt is killed after its checkpoint at 10
        sinks = outlets(tmp_path, "tensorboard")
        for step in steps:
            sinks.step(metrics(step), loads(step))
        sinks.evaluation(EVALUATION)
        sinks.alarm(ALARM)
        sinks.close()
    found, purged = {}, []
    for event in events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):
            purged.append((event.step, event.session_log.status))
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    assert purged == [(1, event_pb2.SessionLog.START), (11, event_pb2.SessionLog.START)]
    losses = [(step, value.simple_value) for step, value in found["train/loss"]]
    assert losses == [(n, pytest.approx(1 / n)) for n in (*range(1, 13), 11, 12, 13)]
    layers = [(step, value.simple_value) for step, value in found["experts/max_vio/layer-mtp0"]]
    assert layers == [(1, 2.25), (11, 2.25), (11, 2.25)]
    assert found["eval/loss/wiki_en"][0][1].simple_value == 1.5
    ((_, image),) = found["experts/load"]
    assert (image.image.height, image.image.width) == (36, 768)
    ((_, histogram),) = found["experts/load/layer-1"]
    assert (histogram.histo.num, histogram.histo.min, histogram.histo.max) == (4, 0, 2)
    assert found["alarms/dead_expert/text_summary"][0][1].tensor.string_val == [b"expert 1 died"]
