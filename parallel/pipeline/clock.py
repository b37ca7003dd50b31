"""Moments of a walk on the time line of the device that does the work, and its ranges for a profiler."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import Group
from parallel.pipeline.action import Schedule, Slot
from parallel.pipeline.timeline import Span, Timeline


class Clock:
    """Notes when slots began and ended. On CUDA that is an event in the stream, and nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._origin = self._now()
        self._slots: list[tuple[Slot, Any, Any]] = []

    def begin(self, slot: Slot) -> Any:
        """What `end` takes. Opens an NVTX range on CUDA."""
        if self._on_cuda:
            torch.cuda.nvtx.range_push("&".join(map(str, slot)))
        return self._now()

    def end(self, slot: Slot, begin: Any) -> None:
        """A slot is done."""
        self._slots.append((slot, begin, self._now()))
        if self._on_cuda:
            torch.cuda.nvtx.range_pop()

    def spans(self) -> Sequence[Span]:
        """Seconds since the clock was made. On CUDA this waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
        return [Span(slot, self._seconds(begin), self._seconds(end)) for slot, begin, end in self._slots]

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        if not self._on_cuda:
            return float(moment - self._origin)
        return float(self._origin.elapsed_time(moment)) / 1000


def gather_timeline(
    schedule: Schedule, spans: Sequence[Span], group: Group, device: torch.device
) -> Timeline:
    """The spans of all ranks of a pipeline, each since its own walk began. Every rank must call.

    A barrier before the walk makes these the same moment, up to its own latency.
    """
    if group is None:
        return Timeline(schedule, (tuple(spans),))
    moments = torch.zeros(max(map(len, schedule.slots)), 2, dtype=torch.float64)
    for index, span in enumerate(spans):
        moments[index, 0], moments[index, 1] = span.begin, span.end
    mine = moments.to(device)
    everyones = [torch.empty_like(mine) for _ in schedule.slots]
    dist.all_gather(everyones, mine, group=group)
    return Timeline(
        schedule,
        tuple(
            tuple(Span(slot, begin, end) for slot, (begin, end) in zip(slots, found.tolist(), strict=False))
            for slots, found in zip(schedule.slots, everyones, strict=True)
        ),
    )
