"""A command's plan on its way to the ranks it starts: a temporary folder, that also takes what they found.

A plan is a frozen dataclass of plain values, so JSON holds it. No torch.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from moe.rules import build

Plan = TypeVar("Plan")

_PLAN = "plan.json"


@contextmanager
def hand_over(plan: Any, parent: Path | None = None) -> Iterator[Path]:
    """A folder with the plan, for as long as the ranks need it; in `parent` where all of them see it."""
    with tempfile.TemporaryDirectory(prefix=".switchyard-", dir=parent) as name:
        folder = Path(name).resolve()
        (folder / _PLAN).write_text(json.dumps(asdict(plan)))
        yield folder


def take_over(cls: type[Plan], folder: Path) -> Plan:
    """The plan in a folder, as a rank reads it."""
    return build(cls, json.loads((folder / _PLAN).read_text()))
