"""Sinks that fail, hang or lag do not reach the training; what they do is said once."""

import logging
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import pytest

from moe.config import SinkName
from moe.telemetry.sinks import outlet
from moe.telemetry.sinks.message import Alarm, Evaluation, Origin, Step
from moe.telemetry.sinks.outlet import SINKS
from tests.moe.telemetry.sinks.told import ALARM, EVALUATION, loads, metrics, outlets


class Fake:
    """Notes what it is told; fails at `bad` ("open" or a step); at `slow` waits until `go`."""

    bad: object = None
    slow: object = None

    def __init__(self, origin: Origin) -> None:
        self.told: list[object] = []
        self.go, self.waits = threading.Event(), threading.Event()
        type(self).last = self

    def _note(self, what: object) -> None:
        if what == self.slow:
            self.waits.set()
            self.go.wait(30)
        if what == self.bad:
            raise RuntimeError("no route\nto host")
        self.told.append(what)

    def open(self) -> None:
        self._note("open")

    def step(self, message: Step) -> None:
        self._note(message.number)

    def evaluation(self, message: Evaluation) -> None:
        self._note("evaluation")

    def alarm(self, message: Alarm) -> None:
        self._note("alarm")

    def close(self) -> None:
        self._note("close")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    kind = type("OneFake", (Fake,), {})
    monkeypatch.setitem(SINKS, "fake", kind)
    return kind


def test_every_choice_has_a_sink() -> None:
    assert set(SINKS) == set(get_args(SinkName))


def test_messages_arrive_in_order_and_before_the_end(fake: type[Fake], tmp_path: Path) -> None:
    sinks = outlets(tmp_path, "fake")
    for step in range(1, 40):
        sinks.step(metrics(step), loads(step))
    sinks.evaluation(EVALUATION)
    sinks.alarm(ALARM)
    sinks.close()
    sinks.close()
    assert fake.last.told == ["open", *range(1, 40), "evaluation", "alarm", "close"]


@pytest.mark.parametrize(("bad", "told"), [("open", []), (7, ["open", *range(1, 7)])])
def test_a_sink_that_raises_is_closed_and_said_once(
    bad: object, told: list, fake: type[Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitored = type("Other", (Fake,), {})
    fake.bad = bad
    SINKS["other"] = monitored
    try:
        sinks = outlets(tmp_path, "fake", "other")
    finally:
        del SINKS["other"]
    for step in range(1, 20):
        sinks.step(metrics(step), loads(step))
    sinks.close()
    assert fake.last.told == [*told, "close"]
    assert monitored.last.told == ["open", *range(1, 20), "close"]
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "sink fake is off: RuntimeError: no route; training goes on without it")
    ]


def test_a_sink_that_hangs_holds_nothing_up(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outlet, "DRAIN_SECONDS", 0.2)
    fake.slow = 3
    sinks = outlets(tmp_path, "fake")
    for step in range(1, 9):
        sinks.step(metrics(step), loads(step))
    fake.last.waits.wait(10)
    begin = time.monotonic()
    sinks.close()
    assert 0.2 <= time.monotonic() - begin < 2
    assert [record.getMessage() for record in caplog.records] == [
        "sink fake did not close in time: 5 rows unsent"
    ]
    fake.last.go.set()


def test_a_slow_sink_misses_the_oldest_steps_but_no_alarm(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outlet, "WAITING", 4)
    fake.slow = "open"
    sinks = outlets(tmp_path, "fake")
    sinks.alarm(ALARM)
    for step in range(1, 20):
        sinks.step(metrics(step), loads(step))
    fake.last.go.set()
    sinks.close()
    assert fake.last.told == ["open", "alarm", 17, 18, 19, "close"]
    assert len(caplog.records) == 1 and "misses steps" in caplog.text


@pytest.mark.parametrize("name", get_args(SinkName))
def test_a_missing_library_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = {"tensorboard": "tensorboardX", "prometheus": "prometheus_client"}.get(name, name)
    monkeypatch.setitem(sys.modules, library, None)
    sinks = outlets(tmp_path, name)
    sinks.step(metrics(1), loads(1))
    sinks.close()
    assert len(caplog.records) == 1
    assert caplog.text.rstrip().endswith(f"goes on without it: pip install 'switchyard[{name}]'")


def test_a_row_that_cannot_be_read_ends_the_sinks_only(
    fake: type[Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = outlets(tmp_path, "fake")
    sinks.step({}, [])
    sinks.step(metrics(1), loads(1))
    assert fake.last.told == ["open", "close"]
    assert len(caplog.records) == 1 and "KeyError: 'step'" in caplog.text
