"""Weights & Biases: one run there per run here, its files under `wandb/` of the run's folder. No torch.

`WANDB_MODE` decides between online, offline and disabled. Where it is not set, a machine without an API
key keeps the run offline and nobody is asked; `wandb sync RUN/wandb/offline-run-*` sends it later.

W&B's own step counter only grows, so a resumed run could not repeat its steps: the axis of every
number is our own `step` instead.
"""

import logging
import os
import secrets
from typing import Any

from moe.telemetry.sinks.identity import keep_id, known_id
from moe.telemetry.sinks.message import Alarm, Evaluation, Origin, Step, picture

logger = logging.getLogger(__name__)

FINISH_SECONDS = 10.0  # what is not sent by then stays in the run's folder, for `wandb sync`


class WandbSink:
    """Writes with wandb, whose own process does the sending."""

    def __init__(self, origin: Origin) -> None:
        import wandb

        self._library: Any = wandb
        self._origin, self._online = origin, False
        self._run: Any = None

    def open(self) -> None:
        """Begin the run, or continue the one that this run's folder began."""
        folder = self._origin.run
        mode = self._mode()
        self._online = mode == "online"
        self._run = self._library.init(
            project=self._origin.project,
            id=known_id(folder, "wandb") or keep_id(folder, "wandb", secrets.token_hex(8)),
            name=folder.name,
            dir=str(folder),
            mode=mode,
            resume="allow" if self._online else None,  # a run kept offline continues when it is sent
            config=dict(self._origin.config),
            settings=self._library.Settings(
                console="off", silent=True, disable_git=True, save_code=False, finish_timeout=FINISH_SECONDS
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def _mode(self) -> str:
        wanted = os.environ.get("WANDB_MODE")
        if wanted not in (None, "", "online"):
            return wanted
        if self._library.login(prompt=False, verify=False):
            return "online"
        if wanted:
            raise RuntimeError("WANDB_MODE is online, but there is no API key: set WANDB_API_KEY")
        logger.warning("sink wandb has no API key: the run is kept offline in %s/wandb", self._origin.run)
        return "offline"

    def step(self, message: Step) -> None:
        """Numbers of a step, and of some steps a picture of the loads."""
        values: dict[str, Any] = {"step": message.number, **message.scalars()}
        if message.loads is not None:
            values["experts/load"] = self._library.Image(picture(message.loads))
        self._run.log(values)

    def evaluation(self, message: Evaluation) -> None:
        """Numbers of a validation."""
        self._run.log({"step": message.step, **message.scalars()})

    def alarm(self, message: Alarm) -> None:
        """A note in the run's summary and, online, an alert to whom it may concern."""
        self._run.summary[f"alarms/{message.kind}"] = f"step {message.step}: {message.text}"
        if self._online:
            self._run.alert(message.kind, message.text, level="WARN")

    def close(self) -> None:
        """Finish the run there."""
        if self._run is not None:
            self._run.finish()
