"""A timeline in characters, for a terminal. No torch."""

import math
from collections.abc import Sequence

from parallel.pipeline.action import Schedule
from parallel.pipeline.timeline import Span, Timeline

LEGEND = "F forward, B backward, W weight gradients, & a pair F&B, ~ only the wire is busy, . idle"
LATER_STAGE = ", in lower case on a rank's later stages"


def sketch(timeline: Timeline, max_columns: int = 120) -> str:
    """A line per rank, and a legend. A column is as long as the shortest thing seen, or longer to fit."""
    spans = [span for mine in timeline.spans for span in mine]
    parts = [part for span in spans for part in (span.end - span.begin - span.exposed, span.exposed)]
    unit = max(min((part for part in parts if part > 0), default=1.0), timeline.makespan / max_columns)
    columns = math.ceil(timeline.makespan / unit - 1e-6)
    start = timeline.begin
    middles = [start + (column + 0.5) * unit for column in range(columns)]
    width = len(str(len(timeline.spans) - 1))
    lines = [
        f"rank {rank:>{width}}  {_line(timeline.schedule, rank, mine, middles)}"
        for rank, mine in enumerate(timeline.spans)
    ]
    several = any(len(held) > 1 for held in timeline.schedule.stages)
    return "\n".join([*lines, LEGEND + (LATER_STAGE if several else "")])


def _line(schedule: Schedule, rank: int, spans: Sequence[Span], moments: Sequence[float]) -> str:
    """What a rank does at each of the moments, which ascend."""
    characters, rest = [], iter(spans)
    span = next(rest, None)
    for moment in moments:
        while span is not None and span.end <= moment:
            span = next(rest, None)
        characters.append(
            "." if span is None or moment < span.begin else _character(schedule, rank, span, moment)
        )
    return "".join(characters)


def _character(schedule: Schedule, rank: int, span: Span, moment: float) -> str:
    if moment >= span.end - span.exposed:
        return "~"
    if len(span.slot) > 1:
        return "&"
    action = span.slot[0]
    return action.kind if action.stage == schedule.stages[rank][0] else action.kind.lower()
