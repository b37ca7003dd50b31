"""Block-scaled fp8 files are read as the numbers that they stand for, whatever part a rank reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.hf.fp8 import read_dequantized, scales_shape
from moe.hf.inventory import model_tensors
from moe.hf.load import open_model
from parallel.errors import UserError
from tests.moe.hf.tiny import oracle, saved, token_ids

SUFFIX = "_scale_inv"
RELEASED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
WIDE = {"hidden_size": 192, "intermediate_size": 144, "kv_lora_rank": 140, "moe_intermediate_size": 136}


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each block of 128 x 128 divided by what makes its largest number e4m3's largest, and that factor."""
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scales_shape(weight.shape))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            scales[row, column] = weight[block].abs().max() / 448
            stored[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
    return stored, scales


def dequantized(stored: Tensor, scales: Tensor) -> Tensor:
    """One number at a time, at its place in its block."""
    rows, columns = (torch.arange(length) // 128 for length in stored.shape)
    return stored.float() * scales[rows][:, columns]


@pytest.mark.parametrize("shape", [(300, 200), (128, 256), (5, 7), (129, 127)])
def test_any_rectangle(shape: tuple[int, int], tmp_path: Path) -> None:
    """From a file, of which only the blocks that a rectangle touches are needed."""
    stored, scales = quantized(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    save_file({"w": stored, "w" + SUFFIX: scales}, tmp_path / "file")
    whole = dequantized(stored, scales)
    rows, columns = shape
    with safe_open(tmp_path / "file", framework="pt") as handle:
        for top, bottom in ((0, rows), (rows // 2, rows), (0, 1), (min(rows - 1, 127), rows)):
            for left, right in ((0, columns), (columns // 3, columns // 3 + 1), (columns - 2, columns)):
                place = (slice(top, bottom), slice(left, right))
                found = read_dequantized(handle.get_slice("w"), handle.get_slice("w" + SUFFIX), place)
                assert found.dtype == torch.float32 and torch.equal(found, whole[place])


def released(folder: Path) -> dict[str, Tensor]:
    """A tiny V3 folder in the released fp8 layout; returns what its weights stand for."""
    saved(oracle("v3", **WIDE), folder)
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_json, "quantization_config": RELEASED}))
    values, files = {}, dict[str, Tensor]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        values[name] = tensor
        if ".layers." in name and name.endswith("proj.weight"):
            files[name], files[name + SUFFIX] = quantized(tensor)
            values[name] = dequantized(files[name], files[name + SUFFIX])
        else:  # embedding, head, gates and norms stay as they are
            files[name] = tensor
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    return values


def test_a_released_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model is that of transformers with the numbers that the files stand for."""
    values = released(tmp_path / "fp8")
    model = open_model(tmp_path / "fp8")
    assert "`quantization_config` is fp8 in config.json and is not kept" in caplog.text
    reference = saved(oracle("v3", **WIDE), tmp_path / "wide")
    save_file(values, reference / "model.safetensors", metadata={"format": "pt"})
    expected = open_model(reference)
    theirs = dict(model_tensors(expected))
    for name, tensor in model_tensors(model):
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(model(token_ids(1)), expected(token_ids(1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda scales: None, "has None"),
        (lambda scales: scales[:1], "(2, 2) beside a weight of type F8_E4M3"),
        (lambda scales: torch.cat((scales, scales)), "but has (4, 2)"),
    ],
)
def test_scales_that_do_not_fit(change: object, words: str, tmp_path: Path) -> None:
    """Numbers without their factors would pass for weights."""
    released(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight" + SUFFIX
    scales = change(tensors.pop(name))  # type: ignore[operator]
    if scales is not None:
        tensors[name] = scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_model(tmp_path)
    assert name in str(caught.value) and words in str(caught.value)


def test_scales_beside_a_weight_that_is_not_fp8(tmp_path: Path) -> None:
    folder = saved(oracle("v3", **WIDE), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight" + SUFFIX] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="must have shape None beside a weight of type F32"):
        open_model(folder)
