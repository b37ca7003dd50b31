"""Every schedule by its name, and the numbers that each can run with. No torch."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from parallel.errors import UserError
from parallel.pipeline.action import Schedule
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.gpipe import gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.zb_h1 import zb_h1


@dataclass(frozen=True)
class Form:
    """What is known of a schedule before there is one.

    `make` takes ranks, microbatches and stages per rank, which are `stages_per_rank`, or with None as many
    as are asked for. `both_ways`: every stage is held twice. `overlaps`: it can be told to have no pairs.
    """

    make: Callable[[int, int, int], Schedule]
    stages_per_rank: int | None = 1
    both_ways: bool = False
    overlaps: bool = False


FORMS = {
    "gpipe": Form(lambda ranks, microbatches, _: gpipe(ranks, microbatches)),
    "1f1b": Form(lambda ranks, microbatches, _: one_f_one_b(ranks, microbatches), overlaps=True),
    "1f1b-overlap": Form(
        lambda ranks, microbatches, _: one_f_one_b(ranks, microbatches, overlap=True), overlaps=True
    ),
    "interleaved": Form(interleaved, stages_per_rank=None),
    "zb-h1": Form(lambda ranks, microbatches, _: zb_h1(ranks, microbatches)),
    "dualpipe": Form(
        lambda ranks, microbatches, _: dualpipe(ranks, microbatches), both_ways=True, overlaps=True
    ),
    "dualpipev": Form(
        lambda ranks, microbatches, _: dualpipev(ranks, microbatches), stages_per_rank=2, overlaps=True
    ),
}


def make(
    name: str, ranks: int, microbatches: int, *, overlap: bool | None = None, stages_per_rank: int = 2
) -> Schedule:
    """The schedule of that name. `stages_per_rank` is interleaved's.

    `overlap`: None pairs forwards with backwards as the name says. True makes `1f1b` the
    `1f1b-overlap`; False has no pairs in any schedule. Raises UserError where there is no such name, or
    the schedule cannot run with these numbers.
    """
    if name not in FORMS:
        nearest = difflib.get_close_matches(name, FORMS, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no schedule `{name}`: did you mean `{nearest}`?")
    if name in ("1f1b", "1f1b-overlap") and overlap is not None:
        name, overlap = "1f1b-overlap" if overlap else "1f1b", None
    require_numbers(name, ranks, microbatches, stages_per_rank)
    form = FORMS[name]
    schedule = form.make(ranks, microbatches, stages_per_rank)
    return schedule.serial() if form.overlaps and overlap is False else schedule


def make_all(
    ranks: int, microbatches: int, *, stages_per_rank: int = 2
) -> tuple[dict[str, Schedule], dict[str, str]]:
    """By name, all schedules that can run with these numbers, and why the others cannot."""
    made, left_out = {}, {}
    for name in FORMS:
        try:
            made[name] = make(name, ranks, microbatches, stages_per_rank=stages_per_rank)
        except UserError as error:
            left_out[name] = str(error)
    return made, left_out


def count_stages(name: str, ranks: int, stages_per_rank: int) -> int:
    """Parts that a schedule cuts a model into."""
    return ranks * (FORMS[name].stages_per_rank or stages_per_rank)


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
