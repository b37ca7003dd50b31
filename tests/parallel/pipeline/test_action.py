"""Schedules as values: the text form, what it says and what it refuses."""

import pytest

from parallel.errors import UserError
from parallel.pipeline.action import Action, Schedule, parse
from parallel.pipeline.gpipe import forward_only, gpipe
from parallel.pipeline.one_f_one_b import one_f_one_b

BIDIRECTIONAL = """
bidirectional: 2 microbatches
rank 0, stages 0 1: F0@0 F1@1 B1@1 B0@0
rank 1, stages 0 1: F1@0 F0@1 B0@1 B1@0
""".strip()


def test_text() -> None:
    assert str(one_f_one_b(2, 3)) == (
        "1f1b: 3 microbatches\nrank 0, stages 0: F0 F1 B0 F2 B1 B2\nrank 1, stages 1: F0 B0 F1 B1 F2 B2"
    )
    assert "rank 1, stages 1: F0 F1&B0 F2&B1 B2" in str(one_f_one_b(2, 3, overlap=True))
    assert str(parse(BIDIRECTIONAL)) == BIDIRECTIONAL


@pytest.mark.parametrize(
    "schedule",
    [gpipe(2, 3), forward_only(3, 2), one_f_one_b(3, 12), one_f_one_b(4, 5, overlap=True), gpipe(2, 0)],
    ids=lambda schedule: schedule.name,
)
def test_parse_reads_back_what_is_written(schedule: Schedule) -> None:
    assert parse(str(schedule)) == schedule


def test_parse_knows_every_part() -> None:
    schedule = parse("mine: 12 microbatches\nrank 0, stages 0 2: F11@2&B3@0 B11@2\nrank 1, stages 1: F7")
    assert schedule.name == "mine" and schedule.num_microbatches == 12
    assert (schedule.num_ranks, schedule.num_stages) == (2, 3)
    assert schedule.slots[0] == ((Action("F", 11, 2), Action("B", 3, 0)), (Action("B", 11, 2),))
    assert list(schedule.actions(0)) == [Action("F", 11, 2), Action("B", 3, 0), Action("B", 11, 2)]
    assert schedule.slots[1] == ((Action("F", 7, 1),),)


def test_what_an_action_begins_with() -> None:
    schedule = gpipe(3, 1)
    assert schedule.source(Action("F", 0, 0)) is None
    assert schedule.source(Action("F", 0, 2)) == Action("F", 0, 1)
    assert schedule.source(Action("B", 0, 0)) == Action("B", 0, 1)
    assert schedule.source(Action("B", 0, 2)) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1f1b\nrank 0, stages 0: F0", "must begin like `1f1b: 8 microbatches`, but begins with `1f1b`"),
        (
            "a: 1 microbatches\nrank 1, stages 0: F0",
            "line 2 must begin with `rank 0, stages`, but is `rank 1",
        ),
        ("a: 1 microbatches\nrank 0, stages 0: X0", "must be written like `F0`.* but is `X0`"),
        ("a: 1 microbatches\nrank 0, stages 0: F0&", "but is `F0&`"),
        ("a: 1 microbatches\nrank 0, stages 0 1: F0", "but is `F0`"),
    ],
)
def test_parse_names_what_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(text)
