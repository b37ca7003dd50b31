"""TensorBoard: event files under `tensorboard/` of the run's folder. No torch.

`tensorboard --logdir RUNS` shows every run below a folder. The loads of single experts come as a
histogram per layer and as one picture, layers down, experts across.
"""

from typing import Any

from moe.telemetry.sinks.message import Alarm, Evaluation, Origin, Step, picture

FLUSH_SECONDS = 5


class TensorboardSink:
    """Writes with tensorboardX, which needs no TensorFlow and no torch."""

    def __init__(self, origin: Origin) -> None:
        import tensorboardX

        self._library, self._folder = tensorboardX, str(origin.run / "tensorboard")
        self._writer: Any = None

    def open(self) -> None:
        """Nothing yet: a file begins with the step from which on earlier files no longer count."""

    def step(self, message: Step) -> None:
        """Scalars of a step, and of some steps what single experts had."""
        self._scalars(message.scalars(), message.number)
        if message.loads is not None:
            image = picture(message.loads)
            self._writer.add_image("experts/load", image, message.number, dataformats="HWC")
            for layer, loads in zip(message.layers, message.loads, strict=True):
                self._writer.add_histogram(f"experts/load/layer-{layer}", loads, message.number)

    def evaluation(self, message: Evaluation) -> None:
        """Scalars of a validation."""
        self._scalars(message.scalars(), message.step)

    def alarm(self, message: Alarm) -> None:
        """A text beside the step."""
        self._from(message.step).add_text(f"alarms/{message.kind}", message.text, message.step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, named: dict[str, float], step: int) -> None:
        writer = self._from(step)
        for name, value in named.items():
            writer.add_scalar(name, value, step)

    def _from(self, step: int) -> Any:
        """The writer; the first step it hears of purges what an attempt that was killed wrote beyond."""
        if self._writer is None:
            self._writer = self._library.SummaryWriter(
                self._folder,
                purge_step=step,
                flush_secs=FLUSH_SECONDS,
                filename_suffix=f".from-{step}",  # names hold seconds, and a later file would replace another
            )
        return self._writer
