"""The heatmap of expert load for a terminal, as on a login node without a browser. No torch.

A line is a layer (or a step of one layer), a cell an expert, or several neighbours where the terminal is
too narrow. What a cell tells is its load over the layer's mean in seven levels, of which the middle is
even: colours from blue over grey to orange on a terminal, which the colour-blind tell apart, else characters.
"""

import itertools
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from launch.dashboard.view import RunView
from moe.telemetry.history import History
from parallel.errors import UserError

BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # between the levels, of load over the mean
SHADES = " .:-=#@"
COLOURS = (25, 74, 153, 253, 222, 208, 130)  # of 256, as backgrounds
DEAD, DEAD_COLOUR = "x", "\x1b[97;40m"
RESET = "\x1b[0m"
LAST_ALARMS = 3
STEPS_SHOWN = 24  # lines of one layer over time
WIDEST_CELL = 3


@dataclass(frozen=True)
class Look:
    """How wide the lines may be, and whether in colours."""

    width: int
    colours: bool

    @classmethod
    def of(cls, stream: TextIO) -> "Look":
        """Colours on a terminal, unless NO_COLOR (no-color.org) or a dumb one forbids them."""
        is_terminal = stream.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return cls(shutil.get_terminal_size((100, 24)).columns, is_terminal and not plain)


@dataclass(frozen=True)
class Line:
    """A line of the map: its counts [E], and what stands beside them."""

    name: str
    counts: NDArray[np.int64]
    max_vio: float


def draw(run: RunView, look: Look, *, layer: str | None, step: int | None) -> str:
    """All layers at the newest step or at `step`, or one layer over time up to there."""
    history, frame = run.newest()
    head = [_headline(run), *_alarms(run.alarms())]
    if frame < 0:
        return "\n".join([*head, "no expert load is recorded yet"])
    if step is not None:
        frame = _frame_of(history, step, frame)
    if layer is None:
        lines, corner, title = _by_layer(history, frame), "layer", _span(history, frame)
    else:
        lines, corner = _over_time(history, frame, _layer_number(history, layer)), "step"
        title = f"layer {layer}"
    return "\n".join([*head, "", f"expert load, {title}", *_heatmap(lines, corner, look)])


def _by_layer(history: History, frame: int) -> list[Line]:
    values = history.scalars["max_vio"][frame]
    return [
        Line(str(layer), history.counts[frame, number], float(values[number]))
        for number, layer in enumerate(history.layers)
    ]


def _over_time(history: History, frame: int, number: int) -> list[Line]:
    """At most `STEPS_SHOWN` frames, evenly spread, the last one among them."""
    shown = np.unique(np.linspace(0, frame, min(STEPS_SHOWN, frame + 1)).round().astype(int))
    return [
        Line(
            f"{history.steps[f]}",
            history.counts[f, number],
            float(history.scalars["max_vio"][f, number]),
        )
        for f in shown.tolist()
    ]


def _heatmap(lines: Sequence[Line], corner: str, look: Look) -> Iterator[str]:
    num_experts = len(lines[0].counts)
    margin = max(len(corner), *(len(line.name) for line in lines))
    room = max(8, look.width - margin - len("  MaxVio  dead") - 2)
    together = -(-num_experts // room)
    columns = -(-num_experts // together)
    cell = max(1, min(WIDEST_CELL, room // columns))
    last = f"{num_experts - 1}"
    ruler = "0" + last.rjust(columns * cell - 1) if columns * cell > len(last) + 1 else " " * columns * cell
    yield f"{corner:>{margin}}  {ruler}  MaxVio  dead"
    for line in lines:
        cells = "".join(_cell(level, cell, look) for level in _levels(line.counts, together))
        dead = int((line.counts == 0).sum())
        yield f"{line.name:>{margin}}  {cells}  {line.max_vio:6.2f}  {dead or '':>4}".rstrip()
    yield ""
    if together > 1:
        note = f"a column is {together} neighbouring experts; {DEAD} where one of them is dead"
        yield from textwrap.wrap(note, look.width)
    yield _legend(look)


def _levels(counts: NDArray[np.int64], together: int) -> list[int]:
    """The level of each column's mean load, -1 where it holds an expert without a token."""
    begins = np.arange(0, len(counts), together)
    sizes = np.diff(begins, append=len(counts))
    load = np.add.reduceat(counts, begins) / sizes / max(1e-9, counts.mean())
    dead = np.minimum.reduceat(counts, begins) == 0
    return np.where(dead, -1, np.searchsorted(BOUNDS, load, "right")).tolist()


def _cell(level: int, width: int, look: Look) -> str:
    if not look.colours:
        return (DEAD if level < 0 else SHADES[level]) * width
    if level < 0:
        return f"{DEAD_COLOUR}{DEAD * width}{RESET}"
    return f"\x1b[48;5;{COLOURS[level]}m{' ' * width}{RESET}"


def _legend(look: Look) -> str:
    """What each level says, in as many lines as the width asks for."""
    edges = [f"{bound:g}" for bound in BOUNDS]
    words = [f"< {edges[0]}", *map("-".join, itertools.pairwise(edges)), f"> {edges[-1]}"]
    items = [(_cell(-1, 2, look), "dead"), *((_cell(i, 2, look), word) for i, word in enumerate(words))]
    lines, used = ["load over the mean:"], 19
    for swatch, word in items:
        if used + len(word) + 5 > look.width:
            lines, used = [*lines, " "], 1
        mark = swatch if look.colours else f"[{swatch[0]}]"
        lines[-1] += f" {mark} {word}"
        used += len(word) + (4 if look.colours else 5)
    return "\n".join(lines)


def _headline(run: RunView) -> str:
    row = run.last_row
    told = [f"{run.name}: {run.mark()['state']}", f"step {row.get('step', 0):,}"]
    forms = {"loss": "loss {:.3f}", "tokens_per_second": "{:,.0f} tok/s", "mfu": "MFU {:.1%}"}
    told += [form.format(row[key]) for key, form in forms.items() if row.get(key) is not None]
    return "  ".join([*told, *([f"MaxVio {row['max_vio']:.2f}"] if row.get("max_vio") is not None else [])])


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(alarms) > LAST_ALARMS:
        yield f"{len(alarms)} alarms, of which the last {LAST_ALARMS}:"
    for alarm in alarms[-LAST_ALARMS:]:
        message = "".join(each for each in alarm["message"] if each.isprintable())  # no codes for a terminal
        yield f"! step {alarm['step']}: {message}"


def _span(history: History, frame: int) -> str:
    last, span = int(history.steps[frame]), int(history.spans[frame])
    return f"step {last}" if span == 1 else f"steps {last - span + 1} to {last}"


def _frame_of(history: History, step: int, newest: int) -> int:
    first = int(history.steps[0] - history.spans[0]) + 1
    if not first <= step <= history.steps[newest]:
        raise UserError(
            f"`--step` must be a recorded one, but is {step}: use {first} to {history.steps[newest]}"
        )
    return int(np.searchsorted(history.steps, step))


def _layer_number(history: History, layer: str) -> int:
    names = [str(name) for name in history.layers]
    if layer not in names:
        raise UserError(f"`--layer` must be one with experts, but is {layer}: use {', '.join(names)}")
    return names.index(layer)
