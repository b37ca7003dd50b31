"""The checker: what it refuses, and that it names rank, action and rule."""

from dataclasses import replace

import pytest

from parallel.errors import UserError
from parallel.pipeline.action import parse
from parallel.pipeline.check import check, peak_in_flight
from parallel.pipeline.one_f_one_b import one_f_one_b

LAWFUL = "1f1b: 3 microbatches\nrank 0, stages 0: F0 F1 B0 F2 B1 B2\nrank 1, stages 1: F0 B0 F1 B1 F2 B2"


def test_a_lawful_schedule_passes() -> None:
    assert str(one_f_one_b(2, 3)) == LAWFUL
    check(parse(LAWFUL))


@pytest.mark.parametrize(
    ("lawful", "broken", "sentence"),
    [
        ("F1 B1 F2 B2", "F1 B1 F3 B2", "rank 1 runs F3@1, but there are 3 microbatches"),
        ("F1 B1 F2 B2", "F1 B1&B2 F2", "rank 1 runs B1@1 in a slot of 2, but a pair is an F and a B"),
        ("F1 B1 F2 B2", "F1 B1 B2", "rank 1 runs F2@1 0 times, but every F runs once"),
        ("F1 B1 F2 B2", "F1 B1 F2 F2 B2", "rank 1 runs F2@1 2 times"),
        ("F1 B1 F2 B2", "F1 B1 F2", "rank 1 runs B2@1 0 times, but every B runs once"),
        ("F1 B1 F2 B2", "B1 F1 F2 B2", "rank 1 runs B1@1, but a B follows its F"),
        ("F1 B1 F2 B2", "F1&B1 F2 B2", "rank 1 runs B1@1, but a B follows its F"),
        ("F0 B0 F1 B1 F2", "F1 F0 B0 B1 F2", "rank 1 uses the result of F0@0 after that of F1@0, .* rank 0"),
        ("F0 F1 B0 F2 B1", "F0 F1 F2 B1 B0", "rank 0 uses the result of B0@1 after that of B1@1"),
        (
            "F0 B0 F1 B1 F2 B2",
            "F0 F1 F2 B0 B1 B2",
            "rank 0 waits for ever to run B0@0, but what it needs, B0@1, must come first",
        ),
    ],
)
def test_a_mutated_schedule(lawful: str, broken: str, sentence: str) -> None:
    assert LAWFUL.count(lawful) == 1
    with pytest.raises(UserError, match=sentence):
        check(parse(LAWFUL.replace(lawful, broken)))


def test_a_rank_runs_the_stages_that_it_holds() -> None:
    lawful = parse(LAWFUL)
    swapped = replace(lawful, stages=lawful.stages[::-1])
    with pytest.raises(UserError, match="`1f1b` rank 0 runs F0@0, but a rank runs the stages that it holds"):
        check(swapped)


def test_weight_gradients_follow_their_backward_once() -> None:
    check(parse(LAWFUL.replace("B2", "B2 W2").replace("B0", "B0 W0")))
    for broken, sentence in (
        ("W2 B2", "runs W2@., but a W follows its B"),
        ("B2 W2 W2", "runs W2@. 2 times"),
    ):
        with pytest.raises(UserError, match=sentence):
            check(parse(LAWFUL.replace("B2", broken)))


def test_activations_are_held_until_their_last_gradient() -> None:
    apart = "mine: 2 microbatches\nrank 0, stages 0: F0 B0 F1 W0 B1 W1"
    assert peak_in_flight(parse(apart)) == (2,)
    assert peak_in_flight(parse(apart.replace(" W0", "").replace(" W1", ""))) == (1,)


def test_another_order_may_be_lawful() -> None:
    check(parse(LAWFUL.replace("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2")))


def test_pairs_that_wait_for_each_other() -> None:
    """A pair begins with both of its inputs there: B0@1 is not made before F1@0, nor F1@0 before B0@1."""
    text = "tight: 2 microbatches\nrank 0, stages 0: F0 F1&B0 B1\nrank 1, stages 1: F0 F1&B0 B1"
    with pytest.raises(UserError, match="rank 0 waits for ever to run B0@0"):
        check(parse(text))
    check(parse(text.replace("rank 0, stages 0: F0 F1&B0", "rank 0, stages 0: F0 F1 B0")))


def test_a_pair_holds_both_microbatches() -> None:
    text = "a: 2 microbatches\nrank 0, stages 0: F0 {} B1"
    assert peak_in_flight(parse(text.format("F1&B0"))) == (2,)
    assert peak_in_flight(parse(text.format("B0 F1"))) == (1,)


def test_stages_that_several_ranks_hold() -> None:
    lines = ["rank 0, stages 0 1: F0 F1' B1' B0", "rank 1, stages 0 1: F1 F0' B0' B1"]
    check(parse("\n".join(["both ways: 2 microbatches", *lines])))
    with pytest.raises(UserError, match="rank 0 or 1 runs F1@0 0 times"):
        check(parse("\n".join(["both ways: 2 microbatches", lines[0], lines[1].replace("F1 ", "F1' ")])))
