"""Every schedule by its name, and the numbers that each can run with. No torch."""

import difflib
from collections.abc import Callable

from parallel.errors import UserError
from parallel.pipeline.action import Schedule
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.gpipe import gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.zb_h1 import zb_h1

# From ranks, microbatches and stages per rank.
MAKERS: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": lambda ranks, microbatches, _: gpipe(ranks, microbatches),
    "1f1b": lambda ranks, microbatches, _: one_f_one_b(ranks, microbatches),
    "1f1b-overlap": lambda ranks, microbatches, _: one_f_one_b(ranks, microbatches, overlap=True),
    "interleaved": interleaved,
    "zb-h1": lambda ranks, microbatches, _: zb_h1(ranks, microbatches),
    "dualpipe": lambda ranks, microbatches, _: dualpipe(ranks, microbatches),
    "dualpipev": lambda ranks, microbatches, _: dualpipev(ranks, microbatches),
}


def make(
    name: str, ranks: int, microbatches: int, *, overlap: bool | None = None, stages_per_rank: int = 2
) -> Schedule:
    """The schedule of that name. `stages_per_rank` is interleaved's.

    `overlap`: None pairs forwards with backwards as the name says. True makes `1f1b` the
    `1f1b-overlap`; False has no pairs in any schedule. Raises UserError where there is no such name, or
    the schedule cannot run with these numbers.
    """
    if name not in MAKERS:
        nearest = difflib.get_close_matches(name, MAKERS, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no schedule `{name}`: did you mean `{nearest}`?")
    if name in ("1f1b", "1f1b-overlap") and overlap is not None:
        name = "1f1b-overlap" if overlap else "1f1b"
    require_numbers(name, ranks, microbatches, stages_per_rank)
    schedule = MAKERS[name](ranks, microbatches, stages_per_rank)
    paired = any(len(slot) > 1 for mine in schedule.slots for slot in mine)
    return schedule.serial() if paired and overlap is False else schedule


def require_numbers(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> None:
    """Raise UserError where a schedule cannot run with these numbers."""
    given = f"but there are {microbatches} for {ranks} ranks"
    least = max(microbatches, 2 * ranks)
    if name == "dualpipe" and ranks % 2:
        raise UserError(
            f"`dualpipe` needs an even number of pipeline ranks, but there are {ranks}: use {ranks + 1}"
        )
    if name == "dualpipe" and (microbatches % 2 or microbatches < least):
        raise UserError(
            "`dualpipe` needs an even number of microbatches and at least 2 per pipeline rank, "
            f"{given}: use {least + least % 2}"
        )
    if name == "dualpipev" and microbatches < least:
        raise UserError(f"`dualpipev` needs at least 2 microbatches per pipeline rank, {given}: use {least}")
    if name == "interleaved" and microbatches % ranks:
        rounded = microbatches + -microbatches % ranks
        raise UserError(
            f"`interleaved` needs microbatches in multiples of the pipeline ranks, {given}: use {rounded}"
        )
    if name == "interleaved" and stages_per_rank < 2:
        raise UserError(
            f"`interleaved` needs at least 2 stages per rank, but has {stages_per_rank}: use 2, or `1f1b`"
        )
