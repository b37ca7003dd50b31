"""Parts of the benchmark, run in order of importance under a budget of time.

A part is a generator of rows, so whatever it found before it failed or ran out of time is kept, and the
others go on. Its module is imported when its turn comes: what one part needs, the others can do without.
"""

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from launch.bench.gpu.timer import Timer

Value = float | str | None


class Missing(Exception):
    """Something that this machine does not have, said in a few words."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a part's table. Columns name their unit."""

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)
    ok: bool | None = None  # of a check alone: whether it held
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """What parts measure with, and what those before them found. `tiny`: sizes for tests on the CPU."""

    device: torch.device
    timer: Timer
    tiny: bool = False
    found: dict[str, list[Row]] = field(default_factory=dict)  # by part

    def value(self, part: str, row: str, column: str) -> float | None:
        """A number that an earlier part found; None where it did not."""
        for each in self.found.get(part, ()):
            number = each.values.get(column)
            if each.name == row and isinstance(number, int | float):
                return float(number)
        return None


@dataclass(frozen=True, kw_only=True)
class Part:
    """`target` is `module:function`, from a `Bench` to rows; `share` of the budget is the most it takes."""

    name: str
    does: str
    target: str
    share: float

    def rows(self, bench: Bench) -> Iterator[Row]:
        """Import the part's module and begin."""
        module, function = self.target.split(":")
        return iter(getattr(importlib.import_module(module), function)(bench))


def run_parts(
    parts: Sequence[Part], bench: Bench, budget: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run parts for at most about `budget` seconds together; what each gave, as plain values.

    `problem` says why rows are missing: the error's last line, or that the time was over.
    """
    begin, given = time.monotonic(), []
    for part in parts:
        tell(f"{part.name}: {part.does}")
        started = time.monotonic()
        deadline = min(begin + budget, started + part.share * budget)
        rows: list[Row] = []
        bench.found[part.name] = rows
        problem = _run(part, bench, rows, deadline)
        release(bench.device)
        given.append(
            {
                "name": part.name,
                "does": part.does,
                "seconds": time.monotonic() - started,
                "rows": [asdict(row) for row in rows],
                "problem": problem,
            }
        )
    return given


def _run(part: Part, bench: Bench, rows: list[Row], deadline: float) -> str | None:
    if time.monotonic() >= deadline:
        return "not run: the time was over"
    try:
        for row in part.rows(bench):
            rows.append(row)
            if time.monotonic() >= deadline:
                return f"stopped after {len(rows)} rows: its time was over"
    except Missing as missing:
        return f"skipped: {missing}"
    except Exception as error:  # whatever one part does must not take the others' results away
        return last_line(error)
    return None


def last_line(error: Exception) -> str:
    """The kind of an error and the last line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def release(device: torch.device) -> None:
    """Give back the card's memory of what nobody refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
