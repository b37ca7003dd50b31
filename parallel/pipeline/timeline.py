"""When each rank did what: simulated (simulate.py) or measured (executor.py), in one shape. No torch."""

from dataclasses import dataclass

from parallel.pipeline.action import Schedule, Slot


@dataclass(frozen=True)
class Span:
    """A slot from the moment that everything it needs was there to its end.

    `exposed`: how long of it nothing but the wire was busy.
    """

    slot: Slot
    begin: float
    end: float
    exposed: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """The spans of every rank, in order, in seconds or in whatever the costs were."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @property
    def begin(self) -> float:
        """When the first slot begins."""
        return min((span.begin for mine in self.spans for span in mine), default=0.0)

    @property
    def makespan(self) -> float:
        """From the first begin to the last end."""
        return max((span.end for mine in self.spans for span in mine), default=0.0) - self.begin

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Per rank, the time outside its spans."""
        makespan = self.makespan
        return tuple(makespan - sum(span.end - span.begin for span in mine) for mine in self.spans)

    @property
    def exposed(self) -> tuple[float, ...]:
        """Per rank, the time in which nothing but the wire was busy."""
        return tuple(sum(span.exposed for span in mine) for mine in self.spans)
