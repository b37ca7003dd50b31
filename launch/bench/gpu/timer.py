"""Times on a device: warmed up, caches emptied before each round, rounds of several works in turn, medians.

On CUDA a time is the distance of two events in the stream, so gaps in which the card waits for the host
count; on the CPU it is the clock's. This is the one place of the benchmark that knows the difference.
"""

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from parallel.pipeline.tape import moment, seconds

Lap = Callable[[], None]
Work = Callable[[Lap], Any]  # calls the lap where one part ends and the next begins

FLUSH_BYTES = 2**28  # more than any second-level cache


class Timer:
    """Measures on one device. A work's rounds end early once they have taken `limit` seconds."""

    def __init__(
        self, device: torch.device, *, rounds: int = 10, warm_up: int = 2, limit: float = 2.0
    ) -> None:
        self.device, self.rounds, self._warm_up, self._limit = device, rounds, warm_up, limit
        size = FLUSH_BYTES if device.type == "cuda" else 0
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """The median time of a work, in seconds."""
        (whole,) = self.compare({"": lambda lap: work()})[""]
        return whole

    def compare(self, works: Mapping[str, Work]) -> dict[str, tuple[float, ...]]:
        """Run works in turn, so that all see the same machine: median seconds between laps, by name."""
        for work in works.values():
            for _ in range(self._warm_up):
                self._once(work)
        taken: dict[str, list[list[float]]] = {name: [] for name in works}
        end = time.perf_counter() + self._limit * len(works)
        for _ in range(self.rounds):
            for name, work in works.items():
                taken[name].append(self._once(work))
            if time.perf_counter() > end:
                break
        return {name: tuple(map(median, zip(*rounds, strict=True))) for name, rounds in taken.items()}

    def _once(self, work: Work) -> list[float]:
        self._flush.zero_()
        moments = [moment(self.device)]
        work(lambda: moments.append(moment(self.device)))
        moments.append(moment(self.device))
        return [seconds(begin, end) for begin, end in pairwise(moments)]
