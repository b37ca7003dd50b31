"""Under expert parallelism each rank reads its own experts and nothing else's, and each tensor once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import BalanceConfig, ModelConfig
from moe.hf import load as loading
from moe.hf.inventory import model_tensors
from moe.hf.save import save
from moe.model.transformer import Transformer
from tests.ranks import run_ranks


class Spy:
    """A file that notes which tensors are read."""

    def __init__(self, handle: Any, read: list[str]) -> None:
        self.handle, self.read = handle, read

    def __enter__(self) -> "Spy":
        self.handle.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.handle.get_tensor(name)


def load_a_part(rank: int, world_size: int, folder: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        open_file = loading._open_file
        patch.setattr(loading, "_open_file", lambda path: Spy(open_file(path), read))
        model = loading.open_model(Path(folder), group=torch.distributed.group.WORLD)
    return dict(model_tensors(model)), read


def test_expert_parallel_ranks_read_their_own(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_experts=8, moe_intermediate_size=16)
    model, folder = Transformer(config), tmp_path / "model"
    for _, router in model.routers():
        router.bias.uniform_(-1, 1)
    expected = dict(model_tensors(model))
    save(folder, config, BalanceConfig(), expected.items())
    parts = run_ranks(2, load_a_part, str(folder))
    held = {name: tensor for tensors, _ in parts for name, tensor in tensors.items()}
    assert held.keys() == expected.keys()
    for tensors, _ in parts:
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name
    for rank, (_, read) in enumerate(parts):
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}
        assert experts == set(range(4 * rank, 4 * rank + 4))
        assert len(read) == len(set(read))
