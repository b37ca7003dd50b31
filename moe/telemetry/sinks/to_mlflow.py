"""MLflow: the server that `MLFLOW_TRACKING_URI` names, or files under `mlruns/` of the run's folder.

`mlflow-skinny` has no database, so what is kept without a server are plain files; `mlflow
migrate-filestore` takes them into one. MLflow's reports on its own use are switched off. No torch.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from moe.telemetry.sinks.identity import keep_id, known_id
from moe.telemetry.sinks.message import Alarm, Evaluation, Origin, Step

BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits of a request
VALUE_LENGTH = 500  # of a parameter, as older servers take it; newer ones take 6000


class MlflowSink:
    """Writes with MLflow's client, not its global run."""

    def __init__(self, origin: Origin) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        import mlflow

        self._library, self._origin = mlflow, origin
        self._client: Any = None
        self._run_id: str | None = None

    def open(self) -> None:
        """Begin the run, or continue the one that this run's folder began; its settings are parameters."""
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would rather have a database
            place = (self._origin.run / "mlruns").resolve().as_uri()
        self._client = self._library.MlflowClient(tracking_uri=place)
        found = self._found()
        self._run_id = found.info.run_id if found else self._begun()
        self._client.update_run(self._run_id, status="RUNNING")
        known = found.data.params if found else {}  # MLflow keeps a parameter as it was first
        flat = _flat(self._origin.config)
        new = [self._library.entities.Param(key, value) for key, value in flat if key not in known]
        for begin in range(0, len(new), BATCH_PARAMS):
            self._client.log_batch(self._run_id, params=new[begin : begin + BATCH_PARAMS])

    def _found(self) -> Any:
        """The run there that has the id kept here; None where there is none."""
        run_id = known_id(self._origin.run, "mlflow")
        if run_id is None:
            return None
        try:
            return self._client.get_run(run_id)
        except self._library.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else another server than before
                raise
            return None

    def _begun(self) -> str:
        experiment = self._client.get_experiment_by_name(self._origin.project)
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment(self._origin.project)
        )
        run = self._client.create_run(number, run_name=self._origin.run.name)
        return keep_id(self._origin.run, "mlflow", run.info.run_id)

    def step(self, message: Step) -> None:
        """Metrics of a step."""
        self._metrics(message.scalars(), message.number)

    def evaluation(self, message: Evaluation) -> None:
        """Metrics of a validation."""
        self._metrics(message.scalars(), message.step)

    def alarm(self, message: Alarm) -> None:
        """A mark at the step, and the sentence as a tag of the run."""
        self._metrics({f"alarms/{message.kind}": 1.0}, message.step)
        self._client.set_tag(self._run_id, f"alarm.{message.kind}", f"step {message.step}: {message.text}")

    def close(self) -> None:
        """Say that the run has ended."""
        if self._run_id is not None:
            self._client.set_terminated(self._run_id)

    def _metrics(self, named: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        values = [
            self._library.entities.Metric(re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII), value, now, step)
            for name, value in named.items()
        ]
        for begin in range(0, len(values), BATCH_METRICS):
            self._client.log_batch(self._run_id, metrics=values[begin : begin + BATCH_METRICS])


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key and its value, cut to what MLflow takes."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", str(value)[:VALUE_LENGTH]
