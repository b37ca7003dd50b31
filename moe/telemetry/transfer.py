"""How far a long writing of files is: a bar on a terminal, plain lines in a log. No torch.

Whoever writes, and in how many processes, what is seen is the growing sizes of the files.
"""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

_GB = 1e9


class Transfer:
    """Shows bytes as `measure` gives them, out of `total`, from a thread, while a context is open.

    `stream` is standard error when None. On a terminal the bar moves every `every_s` seconds; elsewhere
    a line is written every `log_every_s` and at the end.
    """

    def __init__(
        self,
        total: int,
        measure: Callable[[], int],
        stream: TextIO | None = None,
        *,
        every_s: float = 0.2,
        log_every_s: float = 10.0,
    ) -> None:
        self._total, self._measure = total, measure
        self._stream = sys.stderr if stream is None else stream
        self._bar = self._make_bar() if self._stream.isatty() else None
        self._pause = log_every_s if self._bar is None else every_s
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._stop = threading.Event()
        self._first, self._begin = measure(), time.monotonic()

    def __enter__(self) -> "Transfer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(total=self._total, file=self._stream, unit="B", unit_scale=True, dynamic_ncols=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            self._show()

    def _show(self) -> None:
        done = min(self._measure(), self._total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        rate = (done - self._first) / max(1e-9, time.monotonic() - self._begin)
        share = 100 * done // max(1, self._total)
        print(
            f"{done / _GB:.2f} of {self._total / _GB:.2f} GB ({share}%)  {rate / _GB:.2f} GB/s",
            file=self._stream,
            flush=True,
        )
