"""Timelines as a picture: what every rank does when, simulated and measured alike. No torch.

A row per rank, time to the right, a cell per action with the number of its microbatch. The two of a
pair lie one above the other, so that overlap is seen; what is idle stays empty. Hue tells the kind, and
shade which of a rank's stages it is: DualPipe's two directions. The colours are Okabe and Ito's, which
colour-blind readers tell apart. Figures are made with matplotlib's objects, never its global state, and
matplotlib is imported only when a picture is drawn.
"""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.files import durable_file
from parallel.pipeline.action import Kind
from parallel.pipeline.summary import summarize
from parallel.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, IDLE = "#1f2933", "#66727f", "#edf0f3"
COLOURS: dict[Kind, tuple[str, str]] = {  # of a rank's first stage and of its last; between, a mixture
    "F": ("#0072b2", "#56b4e9"),
    "B": ("#d55e00", "#e69f00"),
    "W": ("#009e73", "#96cc7a"),
}
DOTS_PER_INCH = 150
POINTS = 72.0  # in an inch

# Inches on paper.
LEFT, RIGHT, TOP, BOTTOM = 0.7, 0.3, 0.45, 0.55
TITLE, GAP = 0.34, 0.18  # above a timeline, and between two
ROW, ROW_OF_MANY, MANY = 0.34, 0.27, 32  # a rank's height, and from how many on they are lower
TALLEST = 100.0  # all rows together: no format takes pictures of any size
LEGEND = 0.24  # of a height
TYPICAL_CELL, NARROWEST, WIDEST = 0.2, 10.5, 22.0

CELL, STRIPE = 0.88, 0.22  # of a row's height, of a cell's height
SMALLEST, LARGEST, DIGIT = 4.2, 7.2, 0.62  # font sizes, and a digit's width in one
NAME, CAPTION, WORDS = 11.0, 9.5, 8.5  # font sizes
SAMPLE, SPACE, LETTER = 15.0, 19.0, 0.54  # points; a letter's mean width in its font

Box = tuple[float, float, float, float]  # left, top, width, height


def draw(timelines: Sequence[Timeline], titles: Sequence[str], path: str | Path, unit: str = "") -> None:
    """Draw timelines one under the other on one time axis, into a PNG or SVG file by its suffix.

    Times are counted from each one's first slot, in their unit. The file is replaced in one step.
    """
    path, picture = Path(path), io.BytesIO()
    form = path.suffix.removeprefix(".")
    assert form in ("png", "svg"), f"{path} is neither .png nor .svg"
    _figure(timelines, titles, unit).savefig(picture, format=form)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with durable_file(temporary) as file:
            file.write(picture.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """An action's rectangle, in time and rows. `shade`: 0 on a rank's first stage, 1 on its last."""

    kind: Kind
    shade: float = 0.0
    number: str = ""
    begin: float
    end: float
    exposed: float = 0.0
    top: float = 0.0
    height: float = CELL
    whole: bool = False  # a backward with its weight gradients


def _cells(timeline: Timeline) -> Iterator[_Cell]:
    schedule, start = timeline.schedule, timeline.begin
    for rank, (held, mine) in enumerate(zip(schedule.stages, timeline.spans, strict=True)):
        for span in mine:
            height = CELL / len(span.slot)
            for place, action in enumerate(sorted(span.slot, key=lambda action: action.kind, reverse=True)):
                yield _Cell(
                    kind=action.kind,
                    shade=held.index(action.stage) / max(1, len(held) - 1),
                    number=str(action.microbatch),
                    begin=span.begin - start,
                    end=span.end - start,
                    exposed=span.exposed,
                    top=rank + place * height,
                    height=height,
                    whole=action.kind == "B" and (action.microbatch, action.stage) not in schedule.apart,
                )


def _figure(timelines: Sequence[Timeline], titles: Sequence[str], unit: str) -> "Figure":
    from matplotlib.figure import Figure

    cells = [list(_cells(timeline)) for timeline in timelines]
    rows = [len(timeline.spans) for timeline in timelines]
    longest = max(timeline.makespan for timeline in timelines) or 1.0
    across = _time_axis(cells, longest)
    row = ROW if sum(rows) < MANY else min(ROW_OF_MANY, TALLEST / sum(rows))
    width = LEFT + across + RIGHT
    height = TOP + sum(TITLE + count * row + GAP for count in rows) - GAP + BOTTOM
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")

    def axes_at(left: float, bottom: float, across: float, high: float) -> "Axes":
        axes = figure.add_axes((left / width, bottom / height, across / width, high / height))
        axes.spines[:].set_visible(False)
        return axes

    every = [cell for group in cells for cell in group]
    _draw_legend(axes_at(LEFT, height - TOP, across, LEGEND), every, POINTS * across)
    bottom = height - TOP + GAP
    together = zip(timelines, titles, cells, rows, strict=True)
    for index, (timeline, title, group, count) in enumerate(together):
        bottom -= GAP + TITLE + count * row
        axes = axes_at(LEFT, bottom, across, count * row)
        axes.set(xlim=(0.0, longest), ylim=(count, 0.0))
        _add_boxes(axes, [(0.0, rank, timeline.makespan, CELL) for rank in range(count)], facecolor=IDLE)
        _draw_cells(axes, group, f"timeline-{index}")
        _write_numbers(axes, group, POINTS * across / longest, POINTS * row)
        _dress(axes, title, timeline)
    axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel(f"time ({unit})" if unit else "time", color=MUTED, fontsize=CAPTION)
    return figure


def _time_axis(cells: Sequence[Sequence[_Cell]], longest: float) -> float:
    """Inches of it, for numbers to fit into most cells."""
    lengths = sorted(cell.end - cell.begin for group in cells for cell in group)
    short = lengths[len(lengths) // 10] if lengths else 0.0  # the shortest may have been next to nothing
    return max(NARROWEST, min(WIDEST, TYPICAL_CELL * longest / short if short else 0.0))


def _draw_cells(axes: "Axes", cells: Sequence[_Cell], gid: str) -> None:
    """`gid`: what an SVG calls the group of the cells' rectangles."""
    boxes = [(cell.begin, cell.top, cell.end - cell.begin, cell.height) for cell in cells]
    whole = [cell for cell in cells if cell.whole]
    stripes = [
        (cell.begin, cell.top + (1 - STRIPE) * cell.height, cell.end - cell.begin, STRIPE * cell.height)
        for cell in whole
    ]
    waits = [(cell.end - cell.exposed, cell.top, cell.exposed, cell.height) for cell in cells if cell.exposed]
    _add_boxes(axes, boxes, facecolor=[_colour(cell.kind, cell.shade) for cell in cells], gid=gid)
    _add_boxes(axes, stripes, facecolor=[_colour("W", cell.shade) for cell in whole])
    _add_boxes(axes, waits, facecolor="white", alpha=0.5)
    _add_boxes(axes, waits, facecolor="none", edgecolor=INK, hatch="//////")
    _add_boxes(axes, boxes, facecolor="none", edgecolor="white", linewidth=0.7)


def _add_boxes(axes: "Axes", boxes: Sequence[Box], **look: Any) -> None:
    from matplotlib.collections import PolyCollection

    corners = [
        ((left, top), (left + width, top), (left + width, top + height), (left, top + height))
        for left, top, width, height in boxes
    ]
    axes.add_collection(PolyCollection(corners, **({"linewidth": 0.0} | look)))


def _colour(kind: Kind, shade: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    first, last = map(to_rgb, COLOURS[kind])
    return tuple((1 - shade) * a + shade * b for a, b in zip(first, last, strict=True))


def _write_numbers(axes: "Axes", cells: Sequence[_Cell], unit: float, row: float) -> None:
    """Every cell's microbatch, where it fits. `unit` of time and `row`: in points."""
    for cell in cells:
        across = (cell.end - cell.begin - cell.exposed) * unit - 1
        height = cell.height * (1 - STRIPE if cell.whole else 1)
        size = min(LARGEST, across / (DIGIT * len(cell.number)), 0.9 * height * row)
        if size >= SMALLEST:
            axes.text(
                (cell.begin + cell.end - cell.exposed) / 2,
                cell.top + height / 2,
                cell.number,
                color=INK if cell.shade > 0.5 else "white",
                fontsize=size,
                ha="center",
                va="center_baseline",
            )


def _dress(axes: "Axes", title: str, timeline: Timeline) -> None:
    ranks = range(len(timeline.spans))
    axes.tick_params(colors=MUTED, labelsize=8, length=0, labelbottom=False)
    axes.set_yticks([rank + CELL / 2 for rank in ranks], [f"rank {rank}" for rank in ranks])
    above: dict[str, Any] = {"textcoords": "offset points", "va": "baseline"}
    name = axes.annotate(
        title, (0, 1), (0, 6), xycoords="axes fraction", color=INK, size=NAME, weight="bold", **above
    )
    caption, behind = str(summarize(timeline)), (name, axes.transAxes)
    axes.annotate(caption, (1, 1), (12, 6), xycoords=behind, color=MUTED, size=CAPTION, **above)


def _draw_legend(axes: "Axes", cells: Sequence[_Cell], points: float) -> None:
    """A sample of every sort of cell that there is, side by side on `points`."""
    forward = _Cell(kind="F", begin=0.0, end=SAMPLE)
    backward = replace(forward, kind="B", whole=True)
    upper, lower = replace(forward, height=CELL / 2), replace(backward, height=CELL / 2, top=CELL / 2)
    sorts = [
        ("forward", any(cell.kind == "F" for cell in cells), [forward]),
        ("backward", any(cell.whole for cell in cells), [backward]),
        (
            "input gradients alone",
            any(cell.kind == "B" and not cell.whole for cell in cells),
            [replace(forward, kind="B")],
        ),
        ("weight gradients", any(cell.kind == "W" for cell in cells), [replace(forward, kind="W")]),
        ("stepped in turn", any(cell.height < CELL for cell in cells), [upper, lower]),
        ("only the wire is busy", any(cell.exposed for cell in cells), [replace(forward, exposed=SAMPLE)]),
        ("a rank's later stage", any(cell.shade for cell in cells), [replace(forward, shade=1.0)]),
    ]
    axes.set(xlim=(0.0, points), ylim=(1.0, 0.0))
    axes.set_axis_off()
    samples, left = [], 0.0
    for words, there, sort in sorts:
        if there:
            samples += [replace(cell, begin=left, end=left + SAMPLE) for cell in sort]
            axes.text(left + SAMPLE + 4, CELL / 2, words, color=MUTED, fontsize=WORDS, va="center_baseline")
            left += SAMPLE + SPACE + LETTER * WORDS * len(words)
    _draw_cells(axes, samples, "legend")
