"""Whole trainings whose rows make two hops: one rank's steps, in any order to the bit, truly counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe.config import ClusterConfig, LayoutConfig, RunConfig
from moe.train.counting import Sampling
from moe.train.step import read_batches
from tests.moe.train.test_proof import loader_of
from tests.moe.train.test_step import facts, steps
from tests.ranks import run_ranks
from tests.small import small_run

NODE, SEATS = 2, 4  # ranks, and seats, of a node


class Trained(NamedTuple):
    facts: dict[str, Tensor]
    links: dict[str, list[int]]
    rank_rows: dict[str, list[list[int]]]
    routing: dict[str, Tensor]
    place: int  # in the expert group


def on_ranks(rank: int, world_size: int, config: RunConfig) -> Trained:
    """Two steps, and a third whose routing is kept."""
    trainer, results = steps(config, world_size, rank, 2)
    batches = read_batches(loader_of(config), config, trainer.groups, 2 * config.train.batch_size)
    results.append(trainer.step(2, batches, Sampling(domains=True, routing=True)))
    layers = results[-1].layers
    return Trained(
        facts=facts(trainer, results),
        links={name: layer.links.tolist() for name, layer in layers.items()},
        rank_rows={name: layer.rank_rows.tolist() for name, layer in layers.items()},
        routing=results[-1].routing,
        place=trainer.groups.index("ep"),
    )


def train(config: RunConfig, ranks: int, *, recompute: bool = False, **layout: Any) -> list[Trained]:
    """Under a layout, with one sequence in a microbatch."""
    config = replace(
        config,
        layout=LayoutConfig(**layout),
        cluster=ClusterConfig(gpus_per_node=NODE),
        train=replace(
            config.train,
            batch_size=layout["dp"] * layout["microbatches"],
            recompute="full" if recompute else "none",
        ),
    )
    return run_ranks(ranks, on_ranks, config)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Tokens choose three experts, of two groups among four."""
    return small_run(tmp_path, top_k=3, num_groups=4, top_groups=2)


def test_two_hops_train_as_one_does(config: RunConfig) -> None:
    """To rounding; and without overlap, with recomputation, to the bit."""
    layout = {"dp": 4, "ep": 4, "microbatches": 2}
    straight = train(config, 4, **layout)
    hops = train(config, 4, **layout, dispatch="two_hop")
    serial = train(config, 4, **layout, dispatch="two_hop", overlap=False, recompute=True)
    for mine, plain, other in zip(hops, straight, serial, strict=True):
        assert mine.links == other.links and mine.rank_rows == plain.rank_rows
        assert mine.links != plain.links
        for name, value in mine.facts.items():
            assert torch.equal(value, other.facts[name]), name
            torch.testing.assert_close(value, plain.facts[name], rtol=1e-5, atol=1e-7)
    recount(hops)


def test_two_hops_pass_through_a_pipeline_that_runs_both_ways(config: RunConfig) -> None:
    """Forwards and backwards in turn, between four hops each: one rank's steps."""
    hops = train(config, 8, dp=4, pp=2, ep=4, microbatches=4, schedule="dualpipe", dispatch="two_hop")
    whole = replace(config, train=replace(config.train, batch_size=16))
    alone = facts(*steps(replace(whole, layout=LayoutConfig(microbatches=16)), 1, 0, 3))
    for found in hops:
        for name, expected in alone.items():
            if "domains" not in name:
                torch.testing.assert_close(found.facts[name], expected, rtol=1e-5, atol=1e-7)
    recount(hops)


def recount(results: list[Trained]) -> None:
    """Links and rows from rank to rank, token by token from what every rank chose."""
    for name, links in results[0].links.items():
        expected, rows = [0, 0, 0], [[0] * 4 for _ in range(4)]
        for result in results:
            for key, experts in result.routing.items():
                if key.split("/")[0] != name:
                    continue
                for chosen in (chosen for chosen in experts.tolist() if chosen[0] < 8):
                    expected[2] += len({seat // SEATS for seat in chosen} - {result.place // NODE})
                    for seat in chosen:
                        arrival = seat // SEATS * NODE + result.place % NODE
                        expected[arrival != seat // (SEATS // NODE)] += 1
                        rows[result.place][seat // (SEATS // NODE)] += 1
        assert links == expected and all(expected)
        assert results[0].rank_rows[name] == rows
