"""Placing experts by load: as even as can be, whole groups on a node; and a run that moves them midway."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.config import LayoutConfig, RunConfig, TuneConfig
from moe.model.experts import Experts
from moe.placement import Integers, Nodes, Order, cost, place, rank_rows, read_placement
from moe.rules import validate
from moe.train import state
from moe.train.state import Position
from moe.train.step import Trainer, make_trainer
from moe.train.tuning import placements
from moe.train.world import groups_of
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from tests.moe.train.test_state import save
from tests.moe.train.test_step import steps_from
from tests.ranks import run_ranks
from tests.small import SMALL_MODEL, small_run

# DeepSeek's published example: https://github.com/deepseek-ai/EPLB, two layers of 12 experts.
EPLB = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def made_up(seed: int, num_steps: int, num_experts: int) -> Integers:
    """Counts of experts of very different size, each with noise of its own."""
    stream = np.random.default_rng(seed)
    return stream.poisson(stream.lognormal(4, 1, num_experts), (num_steps, num_experts)).astype(np.int64)


def busiest(load: Integers, order: Order | range, ep: int) -> int:
    return int(rank_rows(load, order, ep).max(1).sum())


def parts(experts: list[int], size: int) -> Iterator[list[int]]:
    """Every way to put experts on ranks of this size, as seats."""
    if not experts:
        yield []
        return
    first, *others = experts
    for friends in combinations(others, size - 1):
        for rest in parts([expert for expert in others if expert not in friends], size):
            yield [first, *friends, *rest]


def greedy(load: Integers, ep: int) -> Order:
    """Heaviest first to the lightest rank with room, by the sums over steps: EPLB without copies."""
    size, sums = load.shape[1] // ep, load.sum(0)
    ranks: list[list[int]] = [[] for _ in range(ep)]
    for expert in np.argsort(-sums, kind="stable").tolist():
        min((r for r in ranks if len(r) < size), key=lambda r: sum(sums[r])).append(expert)
    return tuple(expert for rank in ranks for expert in rank)


def test_small_layers_are_placed_nearly_as_well_as_can_be() -> None:
    """Against all possibilities; never worse than in order, than dealt out by size, than greedily."""
    best = []
    for seed, (num_experts, ep) in enumerate(((8, 2), (8, 4), (9, 3), (12, 3), (6, 2), (10, 5)) * 4):
        load = made_up(seed, 6, num_experts)
        order = place(load, ep, Nodes(), tuple(range(num_experts)))
        assert sorted(order) == list(range(num_experts))
        found = busiest(load, order, ep)
        by_size = np.argsort(-load.sum(0)).tolist()
        dealt = tuple(expert for rank in range(ep) for expert in by_size[rank::ep])
        for other in (range(num_experts), dealt, greedy(load, ep)):
            assert found <= busiest(load, other, ep)
        least = min(
            busiest(load, tuple(seats), ep) for seats in parts(list(range(num_experts)), num_experts // ep)
        )
        assert least <= found <= 1.02 * least
        best.append(found == least)
    assert sum(best) >= 20


def test_ranks_that_are_busy_in_turn() -> None:
    """The sums are even in any order; the steps are not."""
    load, together = np.array([[9, 1, 9, 1], [1, 9, 1, 9]]), (0, 2, 1, 3)
    order = place(load, 2, Nodes(), together)
    assert rank_rows(load, order, 2).tolist() == [[10, 10], [10, 10]]
    assert greedy(load, 2) == together and busiest(load, together, 2) == 36


def test_what_is_even_stays() -> None:
    load = np.full((3, 8), 5)
    assert place(load, 4, Nodes(), (7, 6, 5, 4, 3, 2, 1, 0)) == (6, 7, 4, 5, 2, 3, 0, 1)


def test_groups_stay_together_on_nodes() -> None:
    """In DeepSeek's example they go where EPLB puts them, from where no group lies whole on a node."""
    scattered = (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)
    published = ({frozenset((1, 2)), frozenset((0, 3))}, {frozenset((2, 3)), frozenset((0, 1))})
    for load, expected in zip(EPLB[:, None], published, strict=True):
        order = place(load, 4, Nodes(nodes=2, groups=4), scattered)
        nodes = [order[:6], order[6:]]
        assert {frozenset(expert // 3 for expert in node) for node in nodes} == expected
        in_order = place(load, 4, Nodes(nodes=2, groups=4), tuple(range(12)))
        assert {frozenset(expert // 3 for expert in node) for node in (in_order[:6], in_order[6:])} in (
            expected,
            {frozenset((0, 1)), frozenset((2, 3))},
        )
        assert busiest(load, in_order, 4) <= min(busiest(load, order, 4), busiest(load, range(12), 4))
        free = place(load, 4, Nodes(nodes=2), scattered)
        assert busiest(load, free, 4) <= busiest(load, order, 4)
    load = made_up(3, 5, 32)
    order = place(load, 8, Nodes(nodes=4, groups=8), tuple(range(32)))
    assert all(len({expert // 4 for expert in order[n : n + 8]}) == 2 for n in range(0, 32, 8))
    assert busiest(load, order, 8) < busiest(load, range(32), 8)


def test_cost_is_the_sum_of_fullest_ranks() -> None:
    load = np.array([[5, 1, 2, 2], [1, 1, 1, 4]])
    assert cost(load, np.array([0, 0, 1, 1])) == 6 + 5 == busiest(load, (0, 1, 2, 3), 2)


MODEL = replace(SMALL_MODEL, num_mtp_layers=1)


def written(path: Path, ep: int, orders: dict[str, list[int]]) -> Path:
    path.write_text(json.dumps({"ep": ep, "placement": orders}))
    return path


def orders_of(seed: int) -> dict[str, list[int]]:
    stream = np.random.default_rng(seed)
    return {layer: stream.permutation(8).tolist() for layer in ("1", "2", "mtp0")}


GOOD = orders_of(0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nothing", "must be a file of JSON, but"),
        ({"ep": 2}, "must hold `ep` and `placement`, but"),
        ({"ep": 4, "placement": GOOD}, r"made for `layout\.ep=2`, but .* is for 4: make it with .* --ep 2`"),
        ({"ep": 2, "placement": {**GOOD, "0": GOOD["1"]}}, "but .* names 0: "),
        ({"ep": 2, "placement": {"1": GOOD["1"], "2": GOOD["2"]}}, "but .* lacks mtp0: "),
        ({"ep": 2, "placement": {**GOOD, "2": [0] * 8}}, "each of the 8 experts a seat, but layer 2 of"),
        ({"ep": 2, "placement": {**GOOD, "2": list(range(4))}}, "each of the 8 experts a seat, but layer 2"),
        ({"ep": 2, "placement": {**GOOD, "mtp0": "no"}}, "each of the 8 experts a seat, but layer mtp0"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: object, sentence: str) -> None:
    path = tmp_path / "placement.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        read_placement(path, MODEL, 2)
    with pytest.raises(UserError, match=r"`layout\.placement` must be a file, but .* cannot be read"):
        read_placement(tmp_path / "none.json", MODEL, 2)


def test_one_rank_needs_no_file(tmp_path: Path) -> None:
    path = written(tmp_path / "placement.json", 2, GOOD)
    with pytest.raises(UserError, match=r"is for 2: set `layout\.placement=null`"):
        read_placement(path, MODEL, 1)


def test_chosen_experts_sit_last_on_the_rank_that_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "chosen.json").write_text('{"experts": {"1": [0, 5], "2": []}}')
    file = written(
        tmp_path / "p.json", 2, {"1": [5, 1, 2, 3, 4, 0, 6, 7], "2": GOOD["2"], "mtp0": GOOD["mtp0"]}
    )
    config = replace(
        small_run(tmp_path, num_mtp_layers=1),
        layout=LayoutConfig(ep=2, placement=str(file)),
        tune=TuneConfig(method="esft", selection=str(tmp_path / "chosen.json")),
    )
    found = placements(config, 2)
    assert found["1"].order == (1, 2, 3, 5, 4, 6, 7, 0) and found["1"].held(2, 1) == ((4, 6, 7, 0), 1)
    assert list(found["2"].order) == GOOD["2"] and found["2"].held(2, 0)[1] == 0
    free = placements(replace(config, tune=TuneConfig()), 2)
    assert free["1"].order == (5, 1, 2, 3, 4, 0, 6, 7) and free["1"].chosen is None


LAYOUTS = (
    LayoutConfig(dp=2, ep=2),
    LayoutConfig(pp=2, dp=2, ep=2, microbatches=2, schedule="zb-h1"),
)


@dataclass(frozen=True)
class Steps:
    """What some steps gave: of all ranks the losses and counts, of this one the rows of its experts."""

    losses: list[float]
    counts: list[dict[str, list[int]]]
    received: list[dict[str, int]]


def go_on(rank: int, world_size: int, config: RunConfig, files: list[str | None], folder: Path) -> Steps:
    """A step under each placement in turn, each from the checkpoint of the one before."""
    found = Steps([], [], [])
    with groups_of(validate(config, world_size)) as groups:
        for step, file in enumerate(files):
            placed = replace(config, layout=replace(config.layout, placement=file))
            trainer = make_trainer(placed, groups, 3, torch.device("cpu"))
            if step:
                assert state.load(trainer, open_checkpoint(folder / f"step-{step}")).step == step
            received = watch(trainer)
            (result,) = steps_from(trainer, step, 1)
            save(trainer, folder, Position(step + 1, 8 * (step + 1), 500))
            found.losses.append(result.loss)
            found.counts.append({name: layer.counts.tolist() for name, layer in result.layers.items()})
            found.received.append(received)
    return found


def watch(trainer: Trainer) -> dict[str, int]:
    """The rows that this rank's experts are given from now on, by layer."""
    received: dict[str, int] = {}
    for module, each in trainer.model.named_modules():
        if isinstance(each, Experts):
            number = module.split(".")[1]
            name = number if module.startswith("layers") else f"mtp{number}"

            def count(_: object, arguments: tuple[torch.Tensor, object], name: str = name) -> None:
                received[name] = received.get(name, 0) + len(arguments[0])

            each.register_forward_pre_hook(count)
    return received


def move(rank: int, world_size: int, config: RunConfig, files: list[str | None], folder: Path) -> list[Steps]:
    """Undisturbed, and moved."""
    still = go_on(rank, world_size, config, [None] * len(files), folder / "still")
    return [still, go_on(rank, world_size, config, files, folder / "moved")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"pp{layout.pp}")
def test_experts_move_at_a_checkpoint_and_nothing_else_changes(tmp_path: Path, layout: LayoutConfig) -> None:
    """Elsewhere and in order again: losses, weights, moments and biases are as if undisturbed.

    And each rank's experts are given the very rows that were predicted.
    """
    config = replace(small_run(tmp_path, num_mtp_layers=1), layout=layout)
    orders, ep = [None, orders_of(1), None], layout.ep
    files = [o and str(written(tmp_path / f"{number}.json", ep, o)) for number, o in enumerate(orders)]
    every = run_ranks(layout.pp * (layout.dp or 1), move, config, files, tmp_path)
    still, moved = every[0]
    assert moved.losses == pytest.approx(still.losses, rel=1e-5)
    for step in (2, 3):
        one, other = (open_checkpoint(tmp_path / name / f"step-{step}") for name in ("still", "moved"))
        assert set(one.names) == set(other.names) and len(one.names) > 100
        for name in one.names:
            torch.testing.assert_close(other.read(name), one.read(name), rtol=1e-5, atol=1e-6)
    for step, order in enumerate(orders):
        measured = [found.received[step] for _, found in every]
        for layer, counts in still.counts[step].items():
            seats = order[layer] if order else range(8)
            holders = [rows[layer] for rows in measured if layer in rows]
            assert holders == rank_rows(np.array([counts]), seats, ep)[0].tolist()
