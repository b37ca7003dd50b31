"""What a person watching a run sees: a bar on a terminal, plain lines in a log. No torch.

Both show the same words. The time left is the steps to go times an exponential mean of the time
between updates, which therefore also carries evaluations and checkpoints.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

SMOOTHING = 0.1  # weight of the newest step in the mean step time


class Progress:
    """Progress from `start_step` (steps already done) to `total_steps`.

    `stream` is standard error when None. On a terminal every step is drawn; elsewhere a line is
    written every `log_every` steps and for the last one.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        log_every: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._log_every = log_every
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._last = clock()
        self._step = start_step
        self._step_seconds: float | None = None
        self._bar = self._make_bar() if self._stream.isatty() else None

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self._total,
            initial=self._step,
            file=self._stream,
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
        )

    def update(self, step: int, loss: float, tokens_per_second: float, max_vio: float) -> None:
        """Show that `step` steps are done, with the loss in nats and MaxVio averaged over layers."""
        now = self._clock()
        seconds = (now - self._last) / max(1, step - self._step)
        mean = seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = mean + SMOOTHING * (seconds - mean)
        advanced, self._last, self._step = step - self._step, now, step
        left = _clock_face((self._total - step) * self._step_seconds)
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  MaxVio {max_vio:.2f}  left {left}"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(advanced)
        elif step % self._log_every == 0 or step == self._total:
            print(f"step {step}/{self._total}  {text}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Draw the bar a last time and leave it on the terminal."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def _clock_face(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
