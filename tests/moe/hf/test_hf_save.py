"""Saving: the same bits come back, transformers opens the result, and nothing half-written stays."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe.config import BalanceConfig, ModelConfig
from moe.hf.config import from_hf
from moe.hf.inventory import is_bias, model_tensors
from moe.hf.load import load, open_model
from moe.hf.save import save
from moe.model.transformer import Transformer
from parallel.errors import UserError
from tests.moe.hf.tiny import KINDS, oracle, saved, token_ids

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_mtp_layers=2,
    num_experts=4,
    top_k=2,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_heads=2,
    kv_lora_rank=8,
)


def files_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def export(model: Transformer, balance: BalanceConfig, folder: Path, **options: object) -> Path:
    save(folder, model.config, balance, model_tensors(model), **options)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_transformers_and_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = oracle(kind)
    biases = {name: b.clone() for name, b in reference.named_buffers() if name.endswith("_bias")}
    reference.to(dtype)
    for name, buffer in reference.named_buffers():
        if name in biases:
            buffer.data = biases[name]
    theirs = saved(reference, tmp_path / "theirs")
    model = open_model(theirs, dtype=dtype)
    balance = from_hf(reference.config.to_dict())[1]
    ours = export(model, balance, tmp_path / "ours")
    assert_same_bits(files_of(ours), files_of(theirs))
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in (theirs, ours))
    assert torch.equal(after(token_ids(1)).logits, before(token_ids(1)).logits)
    assert json.loads((ours / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_shards_with_mtp_modules(tie_embeddings: bool, tmp_path: Path) -> None:
    """Two modules, in the released places with the released copies; shards keep to their size."""
    config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
    model = Transformer(config, BalanceConfig(), seed=5)
    for number, (_, router) in enumerate(model.routers()):
        router.bias.fill_(number + 0.5)
    folder = export(model, BalanceConfig(), tmp_path / "model", shard_bytes=4000, eos_token_id=7)
    files = sorted(folder.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 4000
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert all(one + other > 4000 for one, other in itertools.pairwise(sizes))  # no smaller than need be
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    written = files_of(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert index["weight_map"] == {n: file.name for file in files for n in load_file(file)}
    head = written["model.embed_tokens.weight" if tie_embeddings else "lm_head.weight"]
    assert ("lm_head.weight" in written) is not tie_embeddings
    for layer in (2, 3):
        assert torch.equal(written[f"model.layers.{layer}.embed_tokens.weight"], model.embedding.weight)
        assert torch.equal(written[f"model.layers.{layer}.shared_head.head.weight"], head)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    again = open_model(folder)
    assert again.config == config
    assert_same_bits(dict(model_tensors(again)), dict(model_tensors(model)))


def test_order_does_not_matter_and_dtype_spares_the_bias(tmp_path: Path) -> None:
    model = Transformer(TINY, BalanceConfig())
    backwards = list(model_tensors(model))[::-1]
    save(tmp_path / "model", TINY, BalanceConfig(), backwards, dtype=torch.bfloat16)
    written = files_of(tmp_path / "model")
    for name, tensor in written.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
    again = Transformer(TINY, BalanceConfig(), seed=None)
    load(again, tmp_path / "model")
    expected = dict(model_tensors(model))
    for name, tensor in model_tensors(again):
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


def test_v2_with_a_bias_says_that_it_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(TINY, score_function="softmax", normalize_top_k=False)
    model = Transformer(config, BalanceConfig())
    with caplog.at_level(logging.WARNING):
        export(model, BalanceConfig(), tmp_path / "model")
    assert "a deepseek_v2 file has no selection bias" in caplog.text
    assert not any("bias" in name for name in files_of(tmp_path / "model"))


def test_a_part_of_the_experts_is_refused(tmp_path: Path) -> None:
    """A checkpoint of one expert-parallel rank must not pass for a model."""
    part = [
        (name, tensor)
        for name, tensor in model_tensors(Transformer(TINY))
        if "layers.1.moe.experts.3" not in name
    ]
    with pytest.raises(UserError, match=r"lacks 2 tensors, the first `layers\.1\.moe\.experts\.3\."):
        save(tmp_path / "model", TINY, BalanceConfig(), part)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_bias_is_refused(tmp_path: Path) -> None:
    """Others have lost it on export."""
    part = [(name, tensor) for name, tensor in model_tensors(Transformer(TINY)) if not is_bias(name)]
    with pytest.raises(UserError, match=r"lacks 3 tensors, the first `layers\.1\.moe\.router\.bias`"):
        save(tmp_path / "model", TINY, BalanceConfig(), part)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    wider = dataclasses.replace(TINY, moe_intermediate_size=16)
    with pytest.raises(UserError, match=r"must have shape \(\d+, 16\), but has"):
        save(tmp_path / "model", wider, BalanceConfig(), model_tensors(Transformer(TINY)))


def test_a_crash_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(model_tensors(Transformer(TINY)))[:5]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        save(tmp_path / "model", TINY, BalanceConfig(), failing(), shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = Transformer(TINY)
    export(model, BalanceConfig(), folder)  # empty: fine
    before = files_of(folder)
    with pytest.raises(UserError, match="must be new or empty"):
        export(Transformer(TINY, seed=9), BalanceConfig(), folder)
    assert_same_bits(files_of(folder), before)
