"""What every rank of `switchyard verify` does: one case after the other, and rank 0 tells of each.

Rank 0 alone trains the first steps, once for every number of microbatches that the global batch is cut
into, while the others wait; then all take the layout of each case through the same steps. A case ends
at its first step that fails.
"""

import math
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.cases import Case, Plan
from launch.output import write_json
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.train.proof import BOUNDS, Difference, compare, record
from moe.train.step import open_loader
from moe.train.world import groups_of, world

PATIENCE = timedelta(hours=2)  # while rank 0 trains alone


def prove(plan: Plan, folder: Path) -> bool:
    """Whether every case agrees with one rank; all ranks call and get the same answer. Uses the folder."""
    config = plan.config
    with world(PATIENCE) as device:
        corpus = prepare(config.data, config.model.vocab_size)
        loader = open_loader(corpus.train, config)
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        table = Table(plan) if is_first else None
        recorded: set[int] = set()
        passed = True
        for case in plan.cases:
            alone = folder / f"parts-{case.parts}"
            if case.parts not in recorded:
                recorded.add(case.parts)
                if is_first:
                    record(config, loader, plan.steps, case.parts, alone, device)
                if dist.is_initialized():
                    dist.barrier()
            begin = time.perf_counter()
            try:
                differences = list(_told(plan, case, loader, alone, device))
            except Exception as error:
                error.add_note(f"in the case {case.describe()}")
                raise
            passed &= differences[-1].passed
            if table:
                table.add(case, differences, time.perf_counter() - begin)
    if table:
        table.finish()
    return passed


def _told(plan: Plan, case: Case, loader: Loader, alone: Path, device: torch.device) -> Iterator[Difference]:
    """The differences after the first step and the last, or the first that fails."""
    config = case.config(plan.config)
    with (
        groups_of(case.degrees) as groups,
        closing(compare(config, groups, loader, plan.steps, alone, device)) as steps,
    ):
        for difference in steps:
            if difference.step in (1, plan.steps) or not difference.passed:
                yield difference
            if not difference.passed:
                break


class Table:
    """What is printed, and written as JSON: a line for each case and step that is told."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._begin = plan, time.perf_counter()
        self._rows: list[dict[str, Any]] = []
        self._failed: list[Case] = []
        layouts = {case.degrees.describe() for case in plan.cases}
        self._widths = max(6, *map(len, layouts)), max(8, *(len(case.schedule) for case in plan.cases))
        counts = (
            (len(layouts), "layout"),
            (plan.ranks, "rank"),
            (len(plan.cases), "case"),
            (plan.steps, "step"),
        )
        print("{} of {}, in {} of {}".format(*(f"{n} {what}{'s' * (n > 1)}" for n, what in counts)))
        for note in (*plan.notes, BOUNDS):
            print(textwrap.fill(note, 110, subsequent_indent="  "))
        layout, schedule = self._widths
        print(
            f"\n{'layout':<{layout}}  {'schedule':<{schedule}}  recompute  step     loss      aux     norm  "
            "gradient  counts  bias   ties  verdict  worst gradient",
            flush=True,
        )

    def add(self, case: Case, differences: list[Difference], seconds: float) -> None:
        """Print what a case gave."""
        layout, schedule = self._widths
        names = f"{case.degrees.describe():<{layout}}  {case.schedule:<{schedule}}  {case.recompute:<9}"
        for difference in differences:
            print(f"{names}  {_line(difference)}")
            names = " " * len(names)
            self._rows.append(_row(case, difference, seconds))
        if not differences[-1].passed:
            self._failed.append(case)
            for failure in differences[-1].failures():
                print(f"  step {differences[-1].step}: {failure}")
        print(end="", flush=True)

    def finish(self) -> None:
        """Print the summary, and write the file if one was asked for."""
        plan, failed = self._plan, self._failed
        every = {case.degrees.describe() for case in plan.cases}
        agree = len(every - {case.degrees.describe() for case in failed})
        cases = f"{len(plan.cases) - len(failed)} of {len(plan.cases)} cases"
        worst = max(
            (row for row in self._rows if row["step"] == 1),
            key=lambda row: math.inf if row["worst_gradient_diff"] is None else row["worst_gradient_diff"],
        )
        print(
            f"\n{agree} of {len(every)} layouts agree with one rank ({cases}); worst gradient difference "
            f"after step 1 {_number(worst['worst_gradient_diff']).strip()} ({worst['worst_gradient_name']}); "
            f"{time.perf_counter() - self._begin:.0f} s",
            flush=True,
        )
        write_json(Path(plan.json) if plan.json else None, {"passed": not failed, "rows": self._rows})


def _line(difference: Difference) -> str:
    numbers = (
        difference.loss_diff,
        difference.auxiliary_loss_diff,
        difference.grad_norm_diff,
        difference.worst_gradient_diff,
    )
    loss, auxiliary, norm, gradient = map(_number, numbers)
    counts = "equal" if difference.counts_equal else "DIFFER"
    bias = "equal" if difference.bias_equal else "DIFFER"
    verdict = "agrees" if difference.passed else "FAILS"
    return (
        f"{difference.step:>4}  {loss}  {auxiliary}  {norm}  {gradient:>8}  {counts:<6}  {bias:<6}"
        f"{difference.ties:>4}  {verdict:<7}  {difference.worst_gradient_name}"
    )


def _number(value: float | None) -> str:
    return f"{'no number' if value is None else f'{value:.1e}':>7}"


def _row(case: Case, difference: Difference, seconds: float) -> dict[str, Any]:
    facts = {
        "layout": case.degrees.describe(),
        "schedule": case.schedule,
        "recompute": case.recompute,
        "microbatches": case.layout.microbatches,
        **asdict(difference),
        "passed": difference.passed,
        "seconds": seconds,
    }
    return {
        name: None if isinstance(fact, float) and not math.isfinite(fact) else fact
        for name, fact in facts.items()
    }
