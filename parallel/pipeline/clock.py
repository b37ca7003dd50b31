"""Moments of a walk on the time line of the device that does the work, and its ranges for a profiler."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import Group
from parallel.pipeline.action import Schedule, Slot
from parallel.pipeline.tape import moment, seconds
from parallel.pipeline.timeline import Span, Timeline


class Clock:
    """Notes when slots began and ended. On CUDA that is an event in the stream, and nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_cuda = device, device.type == "cuda"
        self._origin = moment(device)
        self._slots: list[tuple[Slot, Any, Any]] = []

    def begin(self, slot: Slot) -> Any:
        """What `end` takes. Opens an NVTX range on CUDA."""
        if self._on_cuda:
            torch.cuda.nvtx.range_push("&".join(map(str, slot)))
        return moment(self._device)

    def end(self, slot: Slot, begin: Any) -> None:
        """A slot is done."""
        self._slots.append((slot, begin, moment(self._device)))
        if self._on_cuda:
            torch.cuda.nvtx.range_pop()

    def spans(self) -> Sequence[Span]:
        """Seconds since the clock was made. On CUDA this waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
        origin = self._origin
        return [Span(slot, seconds(origin, begin), seconds(origin, end)) for slot, begin, end in self._slots]


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
