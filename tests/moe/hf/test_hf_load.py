"""Loading: shards, dtypes, and a sentence for everything wrong with a folder."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.config import BalanceConfig
from moe.hf.config import from_hf
from moe.hf.inventory import model_tensors
from moe.hf.load import load, open_model
from moe.hf.save import save
from moe.model.transformer import Transformer
from parallel.errors import UserError
from tests.moe.hf.tiny import oracle, saved, token_ids


def rewrite(folder: Path, change: Any) -> None:
    """Let `change` edit the tensors of a folder in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_shards(tmp_path: Path) -> None:
    reference = oracle("v3")
    whole = open_model(saved(reference, tmp_path / "whole"))
    folder = saved(reference, tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    expected = dict(model_tensors(whole))
    for name, tensor in model_tensors(open_model(folder)):
        assert torch.equal(tensor, expected[name]), name


def test_bf16_files_and_models(tmp_path: Path) -> None:
    """The bias stays fp32 in a bf16 model, and fp32 weights may come from bf16 files."""
    reference = oracle("v3")
    bias = reference.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    folder = saved(reference, tmp_path / "fp32")
    model = open_model(folder, dtype=torch.bfloat16)
    router = dict(model.routers())["1"]
    assert router.projection.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, bias)
    rewrite(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    wide = dict(model_tensors(open_model(folder)))
    for name, tensor in model_tensors(model):
        assert wide[name].dtype == torch.float32
        assert torch.equal(wide[name].bfloat16(), tensor.bfloat16()), name


def mtp_folder(folder: Path) -> Transformer:
    config, balance = from_hf(oracle("v3").config.to_dict())
    model = Transformer(dataclasses.replace(config, num_mtp_layers=1), balance, seed=3)
    save(folder, model.config, balance, model_tensors(model))
    return model


def test_mtp_modules_that_were_not_built_are_left(tmp_path: Path) -> None:
    full = mtp_folder(tmp_path / "model")
    config, balance = from_hf(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert config.num_mtp_layers == 1
    model = Transformer(dataclasses.replace(config, num_mtp_layers=0), balance, seed=None)
    load(model, tmp_path / "model")
    assert torch.equal(model(token_ids(1)), full(token_ids(1)))


def test_mtp_modules_that_transformers_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps counting them in config.json."""
    folder = saved(oracle("v3", num_nextn_predict_layers=1), tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        model = open_model(folder)
    assert model.config.num_mtp_layers == 0
    assert "counts 1 MTP modules, but the files hold 0" in caplog.text


def test_losses_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Field class 2.4: a released config.json without `aux_loss_alpha` left V3's sequence loss silently at 0
    (Megatron Bridge PR #5165)."""
    with caplog.at_level(logging.WARNING):
        open_model(saved(oracle("v2-lite"), tmp_path / "model"))
    assert "`balance.sequence_aux` stays 0" in caplog.text


def test_rotary_tables_are_left(tmp_path: Path) -> None:
    folder = saved(oracle("v2-lite"), tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    open_model(folder)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_model(folder)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_a_missing_tensor(tmp_path: Path) -> None:
    folder = saved(oracle("v2-lite"), tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    refused(folder, "must hold the tensor", EXPERT)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", EXPERT.replace("experts.3", "experts.8"), "other"]
)
def test_an_unexpected_tensor(name: str, tmp_path: Path) -> None:
    folder = saved(oracle("v2-lite"), tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(24, 64)}))
    refused(folder, "must hold only tensors of the configured model", name, "model.safetensors")


def test_a_wrong_shape_leaves_the_model_alone(tmp_path: Path) -> None:
    folder = saved(oracle("v2-lite"), tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    refused(folder, "`model.norm.weight`", "model.safetensors", "(64,)", "(63,)")
    config, balance = from_hf(json.loads((folder / "config.json").read_text()))
    model = Transformer(config, balance)
    before = {name: tensor.clone() for name, tensor in model_tensors(model)}
    with pytest.raises(UserError):
        load(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_tensors(model))


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = saved(oracle("v2-lite"), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, str(file), "must be a whole safetensors file")


def test_a_missing_index_shard_or_file(tmp_path: Path) -> None:
    folder = saved(oracle("v2-lite"), tmp_path / "model", max_shard_size="50KB")
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    moved = json.loads(text)
    moved["weight_map"]["model.norm.bias"] = shards[0].name
    index.write_text(json.dumps(moved))
    refused(folder, "model.norm.bias", shards[0].name, "does not")
    index.write_text(text[:50])
    refused(folder, str(index), "must be JSON")
    index.write_text(text)
    shards[1].unlink()
    refused(folder, shards[1].name, "does not exist")
    index.unlink()
    refused(folder, f"has {len(shards) - 1} safetensors files but neither")
    (folder / "config.json").unlink()
    refused(folder, "has neither config.json")


def test_a_bias_cannot_be_ignored(tmp_path: Path) -> None:
    folder = saved(oracle("v3"), tmp_path / "model")
    config, _ = from_hf(json.loads((folder / "config.json").read_text()))
    with pytest.raises(UserError, match=r"`balance\.bias` must be update or frozen"):
        load(Transformer(config, BalanceConfig(bias="none"), seed=None), folder)
