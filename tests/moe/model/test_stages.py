"""Stages share a model's work as evenly as whole layers allow."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, combinations_with_replacement, pairwise

import pytest

from moe.config import ModelConfig
from moe.model.costs import head_flops, layer_flops, mtp_flops
from moe.model.stages import Part, split, whole
from tests.released import V2_LITE, V3
from tests.small import SMALL_MODEL


def work(config: ModelConfig, bounds: tuple[int, ...], length: int) -> list[int]:
    """FLOPs per token of every stage; stage s has the layers from bounds[s] to bounds[s + 1]."""
    found = [sum(layer_flops(config, k, length) for k in range(*pair)) for pair in pairwise(bounds)]
    found[0] += config.hidden_size
    found[-1] += head_flops(config) + config.num_mtp_layers * mtp_flops(config, length)
    return found


def every_split(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in combinations_with_replacement(range(num_layers + 1), num_stages - 1):
        yield 0, *cuts, num_layers


def sizes(parts: tuple[Part, ...]) -> list[int]:
    return [len(part.layers) for part in parts]


CASES = {
    "like layers": SMALL_MODEL,
    "heavy head": replace(SMALL_MODEL, vocab_size=1000),
    "light head": replace(SMALL_MODEL, vocab_size=8),
    "heavy dense layers": replace(SMALL_MODEL, num_dense_layers=2, intermediate_size=250),
    "light dense layers": replace(SMALL_MODEL, num_dense_layers=3, intermediate_size=8, vocab_size=64),
    "MTP": replace(SMALL_MODEL, num_mtp_layers=2, vocab_size=64),
    "heaviest first, tiny head": replace(SMALL_MODEL, vocab_size=1, intermediate_size=2000),
}


@pytest.mark.parametrize("num_layers", [3, 5, 8])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_no_split_is_better(config: ModelConfig, num_layers: int) -> None:
    """Of all splits the least greatest stage, then the least sum of squares, then the earliest cuts."""
    config = replace(config, num_layers=num_layers)
    for num_stages in range(1, 7):
        ranked = []
        for bounds in every_split(num_layers, num_stages):
            stages = work(config, bounds, 32)
            ranked.append((max(stages), sum(each**2 for each in stages), bounds))
        bounds = min(ranked)[2]
        expected = [range(begin, end) for begin, end in pairwise(bounds)]
        parts = split(config, num_stages, 32)
        assert [part.layers for part in parts] == expected
        assert [part.first for part in parts] == [True] + [False] * (num_stages - 1)
        assert [part.last for part in parts] == [False] * (num_stages - 1) + [True]


@pytest.mark.parametrize(
    ("config", "num_stages", "expected"),
    [
        (V2_LITE, 4, [8, 7, 7, 5]),
        (V2_LITE, 8, [4, 3, 3, 4, 4, 4, 4, 1]),
        (V3, 16, [4] * 15 + [1]),
        (replace(V3, num_mtp_layers=0), 16, [4, 3, *[4] * 13, 2]),
    ],
    ids=["V2-Lite over 4", "V2-Lite over 8", "V3 over 16", "V3 without MTP over 16"],
)
def test_released_models(config: ModelConfig, num_stages: int, expected: list[int]) -> None:
    """V2-Lite's head weighs 2.2 layers of experts, V3's with MTP 3.9; a dense layer a little less than 1."""
    assert sizes(split(config, num_stages, 4096)) == expected
    even, left = divmod(config.num_layers, num_stages)
    evenly = [even + (stage < left) for stage in range(num_stages)]
    slowest, before = (max(work(config, (0, *accumulate(each)), 4096)) for each in (expected, evenly))
    assert slowest < before


def test_a_long_context_makes_the_head_weigh_less() -> None:
    assert sizes(split(V2_LITE, 4, 4096)) == [8, 7, 7, 5]
    assert sizes(split(V2_LITE, 4, 131072)) == [7, 7, 7, 6]


def test_many_stages_take_no_time() -> None:
    begin = time.perf_counter()
    parts = split(V3, 64, 4096)
    assert time.perf_counter() - begin < 1
    assert [part.layers for part in parts if part.layers] == [range(k, k + 1) for k in range(61)]
    assert not parts[-1].layers  # it has the head


def test_one_stage_is_the_whole() -> None:
    assert split(V3, 1, 4096) == (whole(61),) == (Part(range(61), first=True, last=True),)
