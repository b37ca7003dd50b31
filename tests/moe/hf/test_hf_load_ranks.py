"""However the model is cut, each rank reads what it holds and nothing else, and holds what the whole has."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import BalanceConfig, ModelConfig
from moe.hf import weights as reading
from moe.hf.inventory import model_pieces, model_tensors
from moe.hf.load import open_model
from moe.hf.save import save
from moe.model.transformer import Transformer
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.shards import Piece
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_mtp_layers=1,
    num_experts=8,
    moe_intermediate_size=16,
    q_lora_rank=24,
)
Read = tuple[str, int]  # a released tensor, and how many of its elements


class Spy:
    """A file that notes what is read of which tensor."""

    def __init__(self, handle: Any, read: list[Read]) -> None:
        self.handle, self.read = handle, read

    def __enter__(self) -> "Spy":
        self.handle.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.__exit__(*error)

    def keys(self) -> list[str]:
        return self.handle.keys()

    def get_slice(self, name: str) -> "SpiedSlice":
        return SpiedSlice(name, self.handle.get_slice(name), self.read)


class SpiedSlice:
    def __init__(self, name: str, stored: Any, read: list[Read]) -> None:
        self.name, self.stored, self.read = name, stored, read

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, place: Any) -> torch.Tensor:
        tensor = self.stored[place]
        self.read.append((self.name, tensor.numel()))
        return tensor


def load_a_part(rank: int, world_size: int, layout: Layout, folder: str) -> tuple[list[Piece], list[Read]]:
    read: list[Read] = []
    with pytest.MonkeyPatch.context() as patch:
        open_file = reading.open_file
        patch.setattr(reading, "open_file", lambda path: Spy(open_file(path), read))
        model = open_model(Path(folder), groups=build_groups(layout))
    return list(model_pieces(model)), read


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), Layout(tp=2), Layout(dp=2, etp=2), Layout(tp=2, dp=2, ep=2, etp=2)],
    ids=Layout.describe,
)
def test_ranks_read_their_own(layout: Layout, tmp_path: Path) -> None:
    """Gate and up are one tensor here and two in the files: a part of it is the same part of both."""
    model, folder = Transformer(CONFIG), tmp_path / "model"
    for _, router in model.routers():
        router.bias.uniform_(-1, 1)
    expected = dict(model_tensors(model))
    save(folder, CONFIG, BalanceConfig(), expected.items())
    held = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in expected.items()}
    for rank, (parts, read) in enumerate(run_ranks(layout.world_size, load_a_part, layout, str(folder))):
        for piece in parts:
            assert torch.equal(piece.tensor, expected[piece.name][piece.place]), piece.name
            held[piece.name][piece.place] = True
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name, _ in read if ".experts." in name}
        num_local = CONFIG.num_experts // layout.ep
        first = layout.coordinates(rank)["ep"] * num_local
        assert experts == set(range(first, first + num_local))
        assert len(read) == len({name for name, _ in read})
        assert sum(size for _, size in read) == sum(piece.tensor.numel() for piece in parts)
    assert all(there.all() for there in held.values())
