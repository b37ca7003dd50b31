"""Schedules by name: each is what it is called, and says in a sentence when it cannot run."""

import pytest

from parallel.errors import UserError
from parallel.pipeline.check import check
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.schedules import FORMS, count_stages, make, make_all


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("overlap", [None, True, False])
def test_every_name_makes_a_lawful_schedule(name: str, overlap: bool | None) -> None:
    schedule = make(name, 4, 8, overlap=overlap)
    check(schedule)
    assert (schedule.num_ranks, schedule.num_microbatches) == (4, 8)
    assert schedule.name.split()[0].removesuffix("-overlap") == name.removesuffix("-overlap")


def test_overlap_overrules_the_name() -> None:
    paired = {None: {"1f1b-overlap", "dualpipe", "dualpipev"}, False: set()}
    paired[True] = paired[None] | {"1f1b"}
    for overlap, names in paired.items():
        found = {name for name in FORMS if "&" in str(make(name, 4, 8, overlap=overlap))}
        assert found == names
    assert make("1f1b-overlap", 4, 8, overlap=False) == make("1f1b", 4, 8) == one_f_one_b(4, 8)
    assert make("dualpipe", 4, 8, overlap=False) == make("dualpipe", 4, 8).serial()


def test_stages_per_rank() -> None:
    assert make("interleaved", 2, 4) == interleaved(2, 4, 2)
    assert make("interleaved", 2, 4, stages_per_rank=3) == interleaved(2, 4, 3)
    assert make("gpipe", 2, 4, stages_per_rank=3).num_stages == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("dualpip", 4, 8), "there is no schedule `dualpip`: did you mean `dualpipe`?"),
        (("1F1B", 4, 8), "there is no schedule `1F1B`: did you mean `1f1b`?"),
        (
            ("dualpipe", 3, 8),
            "`dualpipe` needs an even number of pipeline ranks, but there are 3: use 4",
        ),
        (
            ("dualpipe", 4, 6),
            "`dualpipe` needs an even number of microbatches and at least 2 per pipeline rank, but there "
            "are 6 for 4 ranks: use 8",
        ),
        (
            ("dualpipe", 4, 9),
            "`dualpipe` needs an even number of microbatches and at least 2 per pipeline rank, but there "
            "are 9 for 4 ranks: use 10",
        ),
        (
            ("dualpipev", 3, 5),
            "`dualpipev` needs at least 2 microbatches per pipeline rank, but there are 5 for 3 ranks: use 6",
        ),
        (
            ("interleaved", 8, 20),
            "`interleaved` needs microbatches in multiples of the pipeline ranks, but there are 20 for 8 "
            "ranks: use 24",
        ),
        (
            ("interleaved", 4, 8, 1),
            "`interleaved` needs at least 2 stages per rank, but has 1: use 2, or `1f1b`",
        ),
    ],
)
def test_what_cannot_run(arguments: tuple, sentence: str) -> None:
    name, ranks, microbatches, *stages = arguments
    with pytest.raises(UserError) as raised:
        make(name, ranks, microbatches, stages_per_rank=stages[0] if stages else 2)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("dualpipe", 4, 10), ("dualpipev", 3, 6), ("dualpipev", 3, 7), ("interleaved", 8, 24), ("zb-h1", 5, 1)],
)
def test_what_can(name: str, ranks: int, microbatches: int) -> None:
    check(make(name, ranks, microbatches))


def test_all_that_can_and_why_the_others_cannot() -> None:
    made, left_out = make_all(3, 6)
    assert {*made, *left_out} == set(FORMS)
    assert list(left_out) == ["dualpipe"]
    assert "needs an even number of pipeline ranks" in left_out["dualpipe"]


@pytest.mark.parametrize("name", FORMS)
def test_what_is_known_of_a_schedule_before_there_is_one(name: str) -> None:
    form, schedule = FORMS[name], make(name, 4, 8, stages_per_rank=3)
    assert count_stages(name, 4, 3) == schedule.num_stages
    assert form.both_ways == (sum(map(len, schedule.stages)) == 2 * schedule.num_stages)
    differs = make(name, 4, 8, overlap=True).slots != make(name, 4, 8, overlap=False).slots
    assert form.overlaps == differs
