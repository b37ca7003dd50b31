"""Choosing experts by score, the file that says so, and where they go."""

import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from moe.hf.inventory import complete, is_bias
from moe.model.experts import Placement
from moe.model.transformer import expert_layers
from moe.selection import Selection, as_json, read_selection, shortest_prefix, spread
from parallel.errors import UserError
from tests.released import V2_LITE
from tests.small import SMALL_MODEL


@pytest.mark.parametrize(
    ("scores", "threshold", "chosen"),
    [
        ((0.1, 0.4, 0.2, 0.3), 0.2, (1,)),
        ((0.1, 0.4, 0.2, 0.3), 0.4, (1,)),  # reached, not passed
        ((0.1, 0.4, 0.2, 0.3), 0.41, (1, 3)),
        ((0.25, 0.25, 0.25, 0.25), 0.5, (0, 1)),  # of equal ones the smaller number
        ((0.1, 0.3, 0.3, 0.3), 0.7, (1, 2, 3)),
        ((0.1,) * 10, 0.3, (0, 1, 2)),  # 0.1 + 0.1 + 0.1 is not 0.3 to every sum
        ((0.5, 0.0, 0.5), 1.0, (0, 2)),  # nothing that was never used
        ((0.02, 0.03), 0.1, (1, 0)),  # gates need not add up to the threshold
    ],
)
def test_the_shortest_prefix_that_reaches_the_threshold(
    scores: tuple[float, ...], threshold: float, chosen: tuple[int, ...]
) -> None:
    assert shortest_prefix(scores, threshold) == chosen


MODEL = replace(SMALL_MODEL, num_mtp_layers=1)


def test_the_file_is_deepseeks(tmp_path: Path) -> None:
    """Layers as in the released files, MTP modules after the last; every layer of experts is named."""
    text = (
        '{"experts": {"1": [3, 0], "3": [7]}, "shared_experts": true, "non_expert_modules": false, "more": 1}'
    )
    (tmp_path / "chosen.json").write_text(text)
    selection = read_selection(tmp_path / "chosen.json", MODEL)
    assert selection == Selection(experts={"1": (3, 0), "mtp0": (7,)}, shared_experts=True)
    assert as_json(selection, MODEL) == {
        "experts": {"1": [3, 0], "2": [], "3": [7]},
        "shared_experts": True,
        "non_expert_modules": False,
    }
    assert selection.trains("layers.1.moe.experts.3.down.weight")
    assert selection.trains("mtp.0.block.moe.experts.7.gate_up.weight")
    assert selection.trains("layers.2.moe.shared.down.weight")
    for name in ("layers.1.moe.experts.7.down.weight", "layers.2.moe.experts.3.down.weight", "norm.weight"):
        assert not selection.trains(name)
    assert not selection.trains("layers.1.moe.router.projection.weight")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nothing", "is not JSON"),
        ([], "no `experts` by layer"),
        ({"experts": {"0": [1]}}, "layers of experts, which are 1 to 3, but names layer 0"),
        ({"experts": {"4": [1]}}, "but names layer 4"),
        ({"experts": {"1": [8]}}, "from 0 to 7, but names 8 in layer 1"),
        ({"experts": {"1": [-1]}}, "from 0 to 7, but names -1"),
        ({"experts": {"1": [True]}}, "no list of experts' numbers"),
        ({"experts": {"1": [2, 2]}}, "names an expert twice"),
        ({"experts": {"1": []}}, "chooses nothing"),
        ({"experts": {"1": [1]}, "shared_experts": "no"}, "neither true nor false"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: object, sentence: str) -> None:
    path = tmp_path / "chosen.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        read_selection(path, MODEL)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_selection(tmp_path / "none.json", MODEL)


def random_selection(seed: int, layers: list[str], most: int) -> Selection:
    stream = random.Random(seed)
    return Selection(
        experts={layer: tuple(stream.sample(range(64), stream.randint(0, most))) for layer in layers}
    )


@pytest.mark.parametrize("ep", [1, 2, 8, 64])
def test_chosen_experts_are_spread_evenly(ep: int) -> None:
    """Over the ranks in each layer, in all of them, and in any layers that follow each other."""
    layers = expert_layers(V2_LITE)
    selection = random_selection(ep, layers, 64)
    held = []
    for layer, order in spread(selection, layers, 64, ep).items():
        assert sorted(order) == list(range(64))
        placement = Placement(tuple(order), frozenset(selection.experts[layer]))
        held.append([placement.held(ep, rank)[1] for rank in range(ep)])
        assert sum(held[-1]) == len(selection.experts[layer])
    for begin, end in combinations(range(len(layers) + 1), 2):
        totals = [sum(column) for column in zip(*held[begin:end], strict=True)]
        assert max(totals) - min(totals) <= 1, (begin, end)


@pytest.mark.parametrize(("chosen", "share"), [(83, 0.046), (153, 0.084)])
def test_the_trained_share_of_the_released_model(chosen: int, share: float) -> None:
    """DeepSeek-V2-Lite with as few and as many experts as the paper chose: 4.6 and 8.4 % of it."""
    layers = expert_layers(V2_LITE)
    each = [chosen // 26 + (index < chosen % 26) for index in range(26)]
    selection = Selection(
        experts={name: tuple(range(number)) for name, number in zip(layers, each, strict=True)}
    )
    sizes = {name: shape.numel() for name, shape in complete(V2_LITE).items() if not is_bias(name)}
    trained = sum(size for name, size in sizes.items() if selection.trains(name))
    assert trained == chosen * 3 * 2048 * 1408
    assert trained / sum(sizes.values()) == pytest.approx(share, abs=5e-4)
