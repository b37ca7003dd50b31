"""Schedules as values: the text form, what it says and what it refuses."""

import pytest

from parallel.errors import UserError
from parallel.pipeline.action import Action, Schedule, parse
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.gpipe import forward_only, gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.zb_h1 import zb_h1

BIDIRECTIONAL = """
bidirectional: 2 microbatches
rank 0, stages 0 1: F0 F1' B1' B0
rank 1, stages 0 1: F1 F0' B0' B1
""".strip()


def test_text() -> None:
    assert str(one_f_one_b(2, 3)) == (
        "1f1b: 3 microbatches\nrank 0, stages 0: F0 F1 B0 F2 B1 B2\nrank 1, stages 1: F0 B0 F1 B1 F2 B2"
    )
    assert "rank 1, stages 1: F0 F1&B0 F2&B1 B2" in str(one_f_one_b(2, 3, overlap=True))
    assert str(parse(BIDIRECTIONAL)) == BIDIRECTIONAL


@pytest.mark.parametrize(
    "schedule",
    [
        *(gpipe(2, 3), gpipe(2, 0), one_f_one_b(3, 12), one_f_one_b(4, 5, overlap=True)),
        *(
            forward_only([(0, 2), (1,)], 2),
            interleaved(2, 4, 3),
            zb_h1(3, 5),
            dualpipe(4, 8),
            dualpipev(2, 4),
        ),
    ],
    ids=lambda schedule: schedule.name,
)
def test_parse_reads_back_what_is_written(schedule: Schedule) -> None:
    assert parse(str(schedule)) == schedule


def test_parse_knows_every_part() -> None:
    schedule = parse("mine: 12 microbatches\nrank 0, stages 0 2: F11'&B3 B11' W3\nrank 1, stages 1: F7")
    assert schedule.name == "mine" and schedule.num_microbatches == 12
    assert (schedule.num_ranks, schedule.num_stages) == (2, 3)
    forward, backward, other, weights = (
        *(Action("F", 11, 2), Action("B", 3, 0)),
        *(Action("B", 11, 2), Action("W", 3, 0)),
    )
    assert schedule.slots[0] == ((forward, backward), (other,), (weights,))
    assert list(schedule.actions(0)) == [forward, backward, other, weights]
    assert schedule.apart == {(3, 0)}
    assert [schedule.is_last(each) for each in (forward, backward, other, weights)] == [
        False,
        False,
        True,
        True,
    ]
    assert schedule.serial().slots[0] == ((forward,), (backward,), (other,), (weights,))
    assert schedule.slots[1] == ((Action("F", 7, 1),),)


def test_what_an_action_begins_with() -> None:
    schedule = gpipe(3, 1)
    assert schedule.source(Action("F", 0, 0)) is None
    assert schedule.source(Action("F", 0, 2)) == Action("F", 0, 1)
    assert schedule.source(Action("B", 0, 0)) == Action("B", 0, 1)
    assert schedule.source(Action("B", 0, 2)) is None
    assert schedule.source(Action("W", 0, 1)) is None


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
        ("a: 1 microbatches\nrank 0, stages 4 7: F0''", "but is `F0''` on a rank with stages 4 7"),
    ],
)
def test_parse_names_what_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(text)
