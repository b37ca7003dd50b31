"""Training begins straight from released files under any layout: each rank reads what it holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.config import LayoutConfig, RunConfig
from moe.hf.inventory import model_pieces
from moe.hf.load import open_model
from moe.hf.weights import Released
from moe.rules import validate
from moe.train.step import make_model
from parallel.groups import build_groups
from tests.moe.hf.shards import TINY_LITE, lite_folder
from tests.ranks import run_ranks


def read_on_ranks(rank: int, world_size: int, config: RunConfig) -> tuple[list, dict[str, int]]:
    """The pieces that a rank holds, and how many elements it read of each released tensor."""
    read: dict[str, int] = {}
    reading = Released.read

    def counted(self: Released, name: str, place: tuple[slice, ...]) -> torch.Tensor:
        tensor = reading(self, name, place)
        read[name] = read.get(name, 0) + tensor.numel()
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Released, "read", counted)
        model = make_model(config, build_groups(validate(config, world_size)))
    return list(model_pieces(model)), read


def test_ranks_read_only_what_they_hold(tmp_path: Path) -> None:
    """tp2·pp2·ep2 straight from released files: every rectangle is the one-rank model's."""
    released = lite_folder(tmp_path / "released")
    layout = LayoutConfig(tp=2, pp=2, ep=2, microbatches=2)
    train = replace(RunConfig().train, init=str(released), precision="bf16")
    config = RunConfig(model=TINY_LITE, layout=layout, train=train)
    whole = {piece.name: piece.tensor for piece in model_pieces(open_model(released, dtype=torch.bfloat16))}
    seen = set()
    for pieces, read in run_ranks(4, read_on_ranks, config):
        for piece in pieces:
            assert torch.equal(piece.tensor, whole[piece.name][piece.place]), piece.name
            seen.add(piece.name)
        parameters = [piece for piece in pieces if not piece.name.endswith("router.bias")]
        assert sum(read.values()) == sum(piece.tensor.numel() for piece in parameters)
    assert seen == whole.keys()
