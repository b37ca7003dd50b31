"""Timelines as Chrome trace events, which ui.perfetto.dev and chrome://tracing open. No torch.

A timeline is a process, a rank a thread of it, an action an event. The two of a pair begin and end
together, so that a viewer shows one under the other. Moments are whole microseconds from a timeline's
first slot, so that no rounding makes an event run into the next; a unit of made-up costs is a second.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from parallel.pipeline.timeline import Timeline

MICROSECONDS = 1e6  # in a second
CATEGORIES = {"F": "forward", "B": "backward", "W": "weight gradients"}


def trace(timelines: Sequence[Timeline], titles: Sequence[str]) -> dict[str, Any]:
    """The content of a trace file, as values for JSON."""
    events = []
    for process, (timeline, title) in enumerate(zip(timelines, titles, strict=True)):
        events += list(_names(process, title, len(timeline.spans)))
        events += sorted(_events(process, timeline), key=lambda event: (event["ts"], event["tid"]))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(process: int, title: str, ranks: int) -> Iterator[dict[str, Any]]:
    def name(what: str, thread: int, **args: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": args}

    yield name("process_name", 0, name=title)
    yield name("process_sort_index", 0, sort_index=process)
    for rank in range(ranks):
        yield name("thread_name", rank, name=f"rank {rank}")
        yield name("thread_sort_index", rank, sort_index=rank)


def _events(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    start = timeline.begin
    for rank, mine in enumerate(timeline.spans):
        words = timeline.schedule.words(rank)
        for span, word in zip(mine, words, strict=True):
            begin, end = (round((moment - start) * MICROSECONDS) for moment in (span.begin, span.end))
            for action, name in zip(span.slot, word.split("&"), strict=True):
                yield {
                    "name": name,
                    "cat": CATEGORIES[action.kind],
                    "ph": "X",
                    "pid": process,
                    "tid": rank,
                    "ts": begin,
                    "dur": end - begin,
                    "args": {
                        "kind": action.kind,
                        "microbatch": action.microbatch,
                        "stage": action.stage,
                        "slot": word,
                        "exposed_us": round(span.exposed * MICROSECONDS),
                    },
                }
