"""The services a run reports to besides its own files. No torch.

Nothing that a service does may hold up or end a training. Each sink therefore has a thread and a
bounded queue of its own: a step only appends to the queue, and where a slow network has filled it the
oldest step gives way. A sink that raises, at its start or at any step, is closed and said so once.
Libraries are imported by the thread that trains (imports of two threads can meet half-made modules);
all that may touch a network happens in the sink's thread.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe.telemetry.sinks.message import Alarm, Evaluation, Origin, Row, Step
from moe.telemetry.sinks.to_mlflow import MlflowSink
from moe.telemetry.sinks.to_prometheus import PrometheusSink
from moe.telemetry.sinks.to_tensorboard import TensorboardSink
from moe.telemetry.sinks.to_wandb import WandbSink

logger = logging.getLogger(__name__)

WAITING = 256  # messages that a sink may be behind
DRAIN_SECONDS = 10.0  # for which the end of a run waits for its sinks, all together

Message = Step | Evaluation | Alarm


class Sink(Protocol):
    """A service. Making one imports its library and no more; every call may raise, only once."""

    def open(self) -> None:
        """Connect."""

    def step(self, message: Step) -> None:
        """Send a step. After a resume step numbers may go back and repeat."""

    def evaluation(self, message: Evaluation) -> None:
        """Send a validation."""

    def alarm(self, message: Alarm) -> None:
        """Send an alarm."""

    def close(self) -> None:
        """Send what is buffered and disconnect; also called when `open` or a message failed."""


SINKS: dict[str, Callable[[Origin], Sink]] = {
    "tensorboard": TensorboardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "prometheus": PrometheusSink,
}


class Outlet:
    """One sink behind its queue and thread."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._accepts, self._told_of_loss = True, False
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Hand over a message, in no time."""
        with self._changed:
            if not self._accepts:
                return
            if lost := len(self._waiting) == WAITING:
                self._drop_oldest()
            self._waiting.append(message)
            self._changed.notify()
        if lost and not self._told_of_loss:
            self._told_of_loss = True
            logger.warning(
                "sink %s is slower than training: it misses steps, the run's files do not", self._name
            )

    def _drop_oldest(self) -> None:
        """A step where there is one: evaluations and alarms are few, and matter."""
        steps = (place for place, message in enumerate(self._waiting) if isinstance(message, Step))
        del self._waiting[next(steps, 0)]

    def finish(self) -> None:
        """Take no more messages, and close the sink after those that wait."""
        with self._changed:
            self._accepts = False
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Until the sink is closed, but no longer than `seconds`."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("sink %s did not close in time: %d rows unsent", self._name, len(self._waiting))

    def _work(self) -> None:
        try:
            self._sink.open()
            while (message := self._next()) is not None:
                match message:
                    case Step():
                        self._sink.step(message)
                    case Evaluation():
                        self._sink.evaluation(message)
                    case Alarm():
                        self._sink.alarm(message)
            self._sink.close()
        except Exception as error:
            with self._changed:
                self._accepts = False
                self._waiting.clear()
            logger.warning("sink %s is off: %s; training goes on without it", self._name, _reason(error))
            with contextlib.suppress(Exception):
                self._sink.close()

    def _next(self) -> Message | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._accepts)
            return self._waiting.popleft() if self._waiting else None


class Outlets:
    """All sinks of a run. No call raises, none waits for a service (`close` does, for DRAIN_SECONDS)."""

    def __init__(self, outlets: Iterable[Outlet]) -> None:
        self._outlets = list(outlets)

    def step(self, metrics_row: Row, load_rows: Sequence[Row]) -> None:
        """Send a step: its row of metrics.jsonl and its rows of expert_load.jsonl."""
        self._tell(lambda: Step.of(metrics_row, load_rows))

    def evaluation(self, row: Row) -> None:
        """Send an evaluation's row of metrics.jsonl."""
        self._tell(lambda: Evaluation.of(row))

    def alarm(self, row: Row) -> None:
        """Send a row of alarms.jsonl."""
        self._tell(lambda: Alarm.of(row))

    def _tell(self, make: Callable[[], Message]) -> None:
        if not self._outlets:
            return
        try:
            message = make()
        except Exception as error:  # a row that nobody foresaw is no reason to end a training
            logger.warning("sinks are off: a row could not be read, %s", _reason(error))
            self.close()
            return
        for outlet in self._outlets:
            outlet.put(message)

    def close(self) -> None:
        """Send what waits and close every sink; those that hang are left behind."""
        deadline = time.monotonic() + DRAIN_SECONDS
        for outlet in self._outlets:
            outlet.finish()
        for outlet in self._outlets:
            outlet.wait(max(0.0, deadline - time.monotonic()))
        self._outlets.clear()


def open_outlets(
    names: Iterable[str], run: Path, *, project: str, host: str, port: int, config: Mapping[str, Any]
) -> Outlets:
    """The sinks of `telemetry.sinks`, each on its own thread; one that cannot be made is said and left out.

    `run` is the run's folder, `config` its nested settings; `host` and `port` are where Prometheus asks.
    """
    origin = Origin(run, project, host, port, config)
    outlets = []
    for name in names:
        try:
            outlets.append(Outlet(name, SINKS[name](origin)))
        except ImportError as error:
            remedy = f"pip install 'switchyard[{name}]'"
            logger.warning(
                "sink %s is off: %s; training goes on without it: %s", name, _reason(error), remedy
            )
        except Exception as error:
            logger.warning("sink %s is off: %s; training goes on without it", name, _reason(error))
    return Outlets(outlets)


def _reason(error: Exception) -> str:
    """In one line: services' messages can have many."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
