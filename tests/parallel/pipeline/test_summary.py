"""The numbers of known schedules, and costs that give every schedule the same work."""

import pytest

from parallel.pipeline.schedules import FORMS, make
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.summary import stage_costs, stage_share, summarize


def summary(name: str, ranks: int, microbatches: int, **costs: float):
    schedule = make(name, ranks, microbatches)
    mine = stage_costs(Costs(**costs), schedule)
    return summarize(simulate(schedule, mine.price(schedule), mine.p2p))


def test_a_share_is_what_a_rank_computes() -> None:
    shares = {name: stage_share(make(name, 4, 8)) for name in FORMS}
    assert shares == dict.fromkeys(FORMS, 1.0) | {"interleaved": 0.5, "dualpipev": 0.5}
    schedule = make("dualpipev", 4, 8)
    assert stage_costs(Costs(f=1, b=2, w=1, a2a=0.5, p2p=0.1), schedule) == Costs(
        f=0.5, b=1, w=0.5, a2a=0.25, p2p=0.1
    )


@pytest.mark.parametrize("name", FORMS)
def test_every_rank_does_the_same_work(name: str) -> None:
    """Eight microbatches of 1 forwards and 2 backwards, and twice their all-to-all where nothing hides it."""
    schedule = make(name, 4, 8, overlap=False)
    costs = stage_costs(Costs(a2a=0.5), schedule)
    timeline = simulate(schedule, costs.price(schedule))
    busy = [sum(span.end - span.begin for span in mine) for mine in timeline.spans]
    assert busy == pytest.approx([8 * (1 + 2 + 2 * 0.5)] * 4)


@pytest.mark.parametrize(
    ("name", "makespan", "bubble", "peak", "weights"),
    [
        ("gpipe", 33, 9, 8, 1),  # (P - 1)(F + B), all microbatches
        ("1f1b", 33, 9, 4, 1),  # P of them
        ("interleaved", 28.5, 4.5, 5.5, 1),
        ("zb-h1", 27, 3, 4, 1),  # (P - 1)(F + B - 2W)
        ("dualpipe", 26, 2, 5, 2),  # (P/2 - 1)(F&B + B - 3W), P + 1, twice the weights
        ("dualpipev", 27, 3, 4.5, 1),
    ],
)
def test_known_numbers(name: str, makespan: float, bubble: float, peak: float, weights: float) -> None:
    found = summary(name, 4, 8)
    assert (found.makespan, found.bubble, found.exposed) == (makespan, bubble, 0)
    assert (found.peak_share, found.weights_held) == (peak, weights)


def test_the_worst_rank_counts() -> None:
    """Rank 0 of 1F1B holds most; the rank that waits longest for the wire is not the one with most bubble."""
    found = summary("1f1b-overlap", 4, 8, a2a=0.6)
    assert found.peak_activations == (8, 6, 4, 2) and found.peak_share == 8
    assert found.bubble == pytest.approx(12.6) and found.exposed == pytest.approx(8.4)


def test_in_words() -> None:
    assert (
        str(summary("dualpipe", 4, 8))
        == "makespan 26, bubble 2 (7.7%), peak activations 5 microbatches, weights held 2x"
    )
    assert ", exposed communication 6 (18.4%), " in str(summary("dualpipe", 4, 8, a2a=0.6))
    nothing = Costs(f=0, b=0, w=0)
    schedule = make("gpipe", 2, 2)
    assert str(summarize(simulate(schedule, nothing.price(schedule)))).startswith("makespan 0, bubble 0, ")
