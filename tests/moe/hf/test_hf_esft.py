"""Changed experts out of a run and back into a whole model: they alone differ, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import compose, esft
from moe.hf.inventory import model_tensors
from moe.hf.load import load
from moe.hf.save import save as save_whole
from moe.model.transformer import Transformer
from moe.selection import FILE
from moe.train.state import Position
from parallel.errors import UserError
from tests.moe.train.test_esft import UNEVEN, tuned
from tests.moe.train.test_state import save
from tests.moe.train.test_step import steps


def files(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_changed_experts_leave_and_come_back(tmp_path: Path) -> None:
    config = tuned(tmp_path, UNEVEN)
    trainer, _ = steps(config, 1, 0, 0)
    base = tmp_path / "base"
    save_whole(base, config.model, config.balance, model_tensors(trainer.model), shard_bytes=60_000)
    (base / "tokenizer.json").write_text("{}")
    trainer, _ = steps(config, 1, 0, 2)
    run = tmp_path / "run"
    save(trainer, run / "checkpoints", Position(2, 16, 500))
    (run / "config.yaml").write_text(compose.write_yaml(config))
    assert config.tune.selection is not None
    Path(config.tune.selection).rename(run / "selection.json")  # the run's own copy is what counts

    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    assert esft.export([str(run), str(adapter)]) == 0
    assert json.loads((adapter / FILE).read_text())["experts"] == dict(UNEVEN)
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, chosen in UNEVEN.items()
        for expert in chosen
        for part in ("gate", "up", "down")
    }
    assert files(adapter).keys() == names

    assert esft.merge([str(base), str(adapter), str(whole)]) == 0
    assert {path.name for path in whole.iterdir()} == {path.name for path in base.iterdir()}
    before, after = files(base), files(whole)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    model = Transformer(config.model, config.balance, seed=None)
    load(model, whole)
    trained = dict(model_tensors(trainer.model))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model_tensors(model))

    with pytest.raises(UserError, match="new or empty"):
        esft.export([str(run), str(adapter)])
    released = tmp_path / "released"  # DeepSeek's adapters leave `model.` out
    released.mkdir()
    changed = {name.removeprefix("model."): tensor for name, tensor in files(adapter).items()}
    save_file(changed, released / "model.safetensors")
    esft.merge([str(base), str(released), str(tmp_path / "again")])
    again = files(tmp_path / "again")
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())
    save_file({"layers.9.mlp.gate.weight": torch.zeros(1)}, released / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks `model\.layers\.9\.mlp\.gate\.weight`"):
        esft.merge([str(base), str(released), str(tmp_path / "wrong")])
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".*"))
