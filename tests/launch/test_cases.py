"""Which cases a sweep proves: every layout that fits, every schedule on every axis, a batch cut to fit."""

from dataclasses import replace
from itertools import product
from math import prod

import pytest

from launch.cases import Case, layouts, single, sweep
from moe.config import LayoutConfig, ModelConfig, RunConfig, TrainConfig
from moe.rules import validate
from parallel.errors import UserError

BASE = RunConfig(
    model=ModelConfig(num_layers=8, num_experts=16, num_heads=8),
    layout=LayoutConfig(microbatches=4),
    train=TrainConfig(batch_size=32),
)
AXES = ("tp", "cp", "pp", "dp", "ep", "etp")


def factors(number: int, count: int) -> int:
    """In how many ways a number is a product of so many ordered factors."""
    return sum(prod(several) == number for several in product(range(1, number + 1), repeat=count))


@pytest.mark.parametrize("ranks", [1, 2, 6, 8])
def test_every_layout_is_there_once(ranks: int) -> None:
    found = list(layouts(ranks))
    assert len(set(found)) == len(found)
    assert {layout.world_size for layout in found} == {ranks}
    stages = [size for size in range(1, ranks + 1) if ranks % size == 0]
    assert len(found) == sum(factors(size, 3) * factors(size, 3) for size in stages)


def test_eight_ranks_have_146_layouts() -> None:
    cases, left_out = sweep(BASE, 8, full=False)
    assert left_out == {}
    assert {replace(case.degrees, both_ways=False, node=None) for case in cases} == set(layouts(8))
    assert len(set(layouts(8))) == 146
    straight = [case for case in cases if case.node is None]
    assert len(straight) == 2 * 100 + 8 * 46 - 2  # 8 layers do not make the 16 stages of two schedules


def test_where_experts_lie_on_four_ranks_rows_make_two_hops_once() -> None:
    cases, _ = sweep(BASE, 8, full=False)
    hops = [case for case in cases if case.node is not None]
    assert {replace(case.degrees, node=None) for case in hops} == {
        layout for layout in layouts(8) if layout.ep >= 4
    }
    assert len(hops) == len({case.degrees for case in hops})
    assert {(case.degrees.ep_node, case.degrees.ep_rail) for case in hops} == {(2, 2), (4, 2)}
    assert {case.schedule for case in hops} == {"overlap two-hop", "1f1b overlap two-hop"}


@pytest.mark.parametrize("ranks", [4, 8])
def test_every_axis_meets_every_schedule_with_and_without_recomputation(ranks: int) -> None:
    cases, _ = sweep(BASE, ranks, full=False)
    for axis in AXES:
        met = {(case.schedule, case.recompute) for case in cases if getattr(case.degrees, axis) > 1}
        piped = ["1f1b overlap", "1f1b", "gpipe", "zb-h1", "interleaved", "dualpipe overlap", "dualpipe"]
        schedules = [*piped, "dualpipev overlap"] + ["overlap", "serial"] * (axis != "pp")
        straight = {one for one in met if "two-hop" not in one[0]}
        assert straight == set(product(schedules, ("none", "full"))), axis


def test_every_layout_meets_every_schedule_once_and_in_full_twice() -> None:
    cases, _ = sweep(BASE, 4, full=False)
    every, _ = sweep(BASE, 4, full=True)
    assert len(set(cases)) == len(cases)
    assert set(cases) < set(every) and len(every) == 2 * len(cases)
    for case in cases:
        assert (case.layout.schedule == "gpipe") <= (case.layout.pp > 1 and not case.layout.overlap)


def test_every_case_is_a_valid_run_of_these_ranks() -> None:
    for case in sweep(BASE, 8, full=False)[0]:
        assert validate(case.config(BASE), 8) == case.degrees
        assert case.config(BASE).train.recompute == case.recompute


def test_what_does_not_divide_is_counted() -> None:
    odd = replace(BASE, model=replace(BASE.model, num_heads=3, num_experts=5))
    cases, left_out = sweep(odd, 2, full=False)
    assert {case.degrees.describe() for case in cases} == {"pp2", "dp2", "dp2·etp2", "cp2", "cp2·etp2"}
    assert left_out == {"what does not divide this model, its sequences or its batch": 5}


@pytest.mark.parametrize(
    ("batch", "wanted", "by_dp"),
    [(32, 4, {1: 4, 2: 4, 4: 4}), (12, 4, {1: 4, 2: 3, 4: 3}), (2, 4, {1: 2, 2: 1})],
)
def test_microbatches_are_lowered_where_the_batch_asks_for_it(
    batch: int, wanted: int, by_dp: dict[int, int]
) -> None:
    config = replace(
        BASE, train=TrainConfig(batch_size=batch), layout=replace(BASE.layout, microbatches=wanted)
    )
    cases, _ = sweep(config, 4, full=False)
    assert {case.degrees.dp: case.layout.microbatches for case in cases} == by_dp
    assert {case.parts for case in cases} == {dp * count for dp, count in by_dp.items()}


def test_a_mistake_that_is_no_matter_of_the_layout_is_told() -> None:
    with pytest.raises(UserError, match=r"`model.top_k` must lie between"):
        sweep(replace(BASE, model=replace(BASE.model, top_k=99)), 2, full=False)


def test_capacity_leaves_out_what_cuts_sequences() -> None:
    """Nor is it proven alone: what is dropped there is not what one rank drops."""
    dropping = replace(BASE, model=replace(BASE.model, capacity_factor=1.25))
    cases, left_out = sweep(dropping, 2, full=False)
    assert {(case.degrees.tp, case.degrees.cp) for case in cases} == {(1, 1)}
    assert [count for reason, count in left_out.items() if "capacity_factor" in reason] == [6]
    for axis in ("tp", "cp"):
        with pytest.raises(UserError, match=r"`model.capacity_factor` must be null"):
            single(replace(dropping, layout=LayoutConfig(**{axis: 2})), None)
    assert single(replace(dropping, layout=LayoutConfig(ep=2)), None).degrees.dp == 2


def test_the_recipes_own_case() -> None:
    config = replace(BASE, layout=LayoutConfig(ep=2, microbatches=2, overlap=False))
    assert single(config, 4) == Case(layout=replace(config.layout, dp=4), recompute="none")
    assert single(config, None).degrees.world_size == 2
    assert single(config, None).describe() == "dp2·ep2, serial, recompute none"
