"""From the released layout to ours and back: bit for bit, one tensor in memory, every mistake named."""

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.hf import weights as reading
from moe.hf.convert import plan_from_hf, plan_to_hf
from moe.hf.inventory import complete, model_tensors, released_parts
from moe.hf.load import open_model
from moe.hf.save import Conversion
from moe.hf.weights import open_weights
from parallel.assembly import Assembly
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from tests.moe.hf.shards import TINY_LITE, damage, lite_folder, shard, write_sums
from tests.released import V2_LITE

TINY_V3 = replace(
    TINY_LITE, score_function="sigmoid", group_score="top2_sum", normalize_top_k=True, num_mtp_layers=1
)

ATTENTION = ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def make(target: Path, plan: Conversion) -> Path:
    with Assembly(target) as assembly:
        assembly.begin(plan.files)
        assembly.write(plan.files)
        assembly.publish(plan.files, plan.finish)
    return target


def files_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    same_names = ours.keys() == theirs.keys()
    return same_names and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_files_are_laid_out_as_released(tmp_path: Path) -> None:
    """Four shards, an index that knows their bytes, and every expert's matrices by themselves."""
    released = lite_folder(tmp_path / "released")
    names = [f"model-{number:05d}-of-000004.safetensors" for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in released.glob("*.safetensors")) == names
    index = json.loads((released / "model.safetensors.index.json").read_text())
    stored = files_of(released)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in stored.values())}
    assert index["weight_map"].keys() == stored.keys() and sorted(set(index["weight_map"].values())) == names
    block = {"input_layernorm", "post_attention_layernorm", *(f"self_attn.{part}" for part in ATTENTION)}
    experts = [f"mlp.experts.{expert}" for expert in range(8)] + ["mlp.shared_experts"]
    sparse = {f"{mlp}.{part}_proj" for mlp in experts for part in ("gate", "up", "down")} | {"mlp.gate"}
    dense = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    expected = {f"model.layers.{layer}.{part}.weight" for layer in (1, 2) for part in block | sparse}
    expected |= {f"model.layers.0.{part}.weight" for part in block | dense}
    assert stored.keys() == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert stored["model.layers.1.mlp.experts.7.up_proj.weight"].shape == (16, 32)


def test_the_release_has_as_many_tensors_and_bytes() -> None:
    """Those of DeepSeek-V2-Lite's own index."""
    shapes = complete(V2_LITE).items()
    parts = [part for name, shape in shapes for part in released_parts(name, tuple(shape), V2_LITE)]
    assert len(parts) == len({name for name, _ in parts}) == 5291
    assert sum(2 * math.prod(place.extent) for _, place in parts) == 31_412_968_448


@pytest.mark.parametrize("config", [TINY_LITE, TINY_V3], ids=["v2-lite", "v3"])
def test_there_and_back(config, tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released", config)
    ours = make(tmp_path / "ours", plan_from_hf(released))
    saved = open_checkpoint(ours / "checkpoints" / "step-0")
    assert len(list((ours / "checkpoints" / "step-0").glob("model-*-of-000004.safetensors"))) == 4
    model = dict(model_tensors(open_model(released, dtype=torch.bfloat16)))
    for name, tensor in model.items():
        if ".router.bias" not in name:
            assert torch.equal(saved.read(f"model/{name}"), tensor), name
    if config is TINY_V3:
        bias = model["mtp.0.block.moe.router.bias"]
        assert bias.any() and torch.equal(saved.read("router/mtp0.bias"), bias)
        assert torch.equal(saved.read("router/2.bias"), model["layers.2.moe.router.bias"])
    back = make(tmp_path / "back", plan_to_hf(ours, tmp_path / "back", None, 30_000))
    assert same_bits(files_of(back), files_of(released))
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (released, back))
    assert after["metadata"] == before["metadata"]
    assert after["weight_map"].keys() == before["weight_map"].keys()
    for name, file in after["weight_map"].items():
        assert name in load_file(back / file)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (back / file).read_bytes() == (released / file).read_bytes(), file
    write_then = (back / "SHA256SUMS").read_text()
    write_sums(back)
    assert (back / "SHA256SUMS").read_text() == write_then


def test_layers_are_written_in_order(tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released")
    plan = plan_to_hf(released, tmp_path / "back", None, 30_000)
    names = [part.key for file in plan.files for part in file.parts]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert len(plan.files) > 3 and layers == sorted(layers)
    assert names[0] == "model.embed_tokens.weight" and set(names[-2:]) == {
        "model.norm.weight",
        "lm_head.weight",
    }
    assert all(len(file.parts) == 1 or file.nbytes <= 30_000 for file in plan.files)


def test_memory_holds_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70 kB in four shards never more than the largest tensor is held, in either direction."""
    released = lite_folder(tmp_path / "released")
    held, most, count = {}, 0, 0

    def watch(tensor: Tensor) -> Tensor:
        nonlocal most, count
        count += 1
        held[count] = tensor.nbytes
        weakref.finalize(tensor, held.pop, count)
        most = max(most, sum(held.values()))
        return tensor

    class Watched:
        def __init__(self, handle: object) -> None:
            self.handle = handle

        def get_slice(self, name: str) -> "WatchedSlice":
            return WatchedSlice(self.handle.get_slice(name))  # type: ignore[attr-defined]

    class WatchedSlice:
        def __init__(self, stored: object) -> None:
            self.stored = stored

        def __getitem__(self, place: object) -> Tensor:
            return watch(self.stored[place])  # type: ignore[index]

    opening = reading.open_file
    monkeypatch.setattr(reading, "open_file", lambda path: Watched(opening(path)))
    largest = max(tensor.nbytes for tensor in files_of(released).values())
    make(tmp_path / "ours", plan_from_hf(released))
    assert count == len(files_of(released)) and most == largest
    make(tmp_path / "back", plan_to_hf(released, tmp_path / "back", None, 30_000))
    assert most == largest


def test_dtype_spares_the_bias(tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released", TINY_V3)
    back = make(tmp_path / "back", plan_to_hf(released, tmp_path / "back", torch.float32))
    assert {tensor.dtype for tensor in files_of(back).values()} == {torch.float32}
    again = make(tmp_path / "again", plan_to_hf(back, tmp_path / "again", torch.bfloat16))
    assert same_bits(files_of(again), files_of(released))
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == "bfloat16"


def refused(action: object, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()  # type: ignore[operator]
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_corrupt_shard_is_named_and_once_mended_only_it_is_read(tmp_path: Path) -> None:
    released, target = lite_folder(tmp_path / "released"), tmp_path / "ours"
    whole = shard(released, 3).read_bytes()
    damage(shard(released, 3))
    refused(
        lambda: make(target, plan_from_hf(released)), shard(released, 3).name, "SHA256SUMS", "copy it again"
    )
    assert not target.exists()
    written = tmp_path / ".ours.partial" / "new" / "checkpoints" / "step-0"
    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    assert set(before) == {shard(released, number).name for number in (1, 2)}
    shard(released, 3).write_bytes(whole)
    make(target, plan_from_hf(released))
    after = {path.name: path.stat().st_mtime_ns for path in (target / "checkpoints" / "step-0").iterdir()}
    assert before.items() <= after.items()
    open_checkpoint(target / "checkpoints" / "step-0")


def test_headers_tell_before_a_byte_is_written(tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released")
    whole = shard(released, 4).read_bytes()
    shard(released, 4).write_bytes(whole[:-1])
    refused(lambda: plan_from_hf(released), str(shard(released, 4)), "whole safetensors file")
    tensors = load_file(shard(released, 2))
    tensors.pop(next(name for name in tensors if "experts" in name))
    shard(released, 4).write_bytes(whole)
    save_file(tensors, shard(released, 2))
    refused(lambda: plan_from_hf(released), shard(released, 2).name, "must hold `model.layers.")
    assert list(tmp_path.iterdir()) == [released]


def test_a_folder_of_ours_is_not_converted_again(tmp_path: Path) -> None:
    ours = make(tmp_path / "ours", plan_from_hf(lite_folder(tmp_path / "released")))
    refused(lambda: plan_from_hf(ours), "must be a Hugging Face folder")
    refused(lambda: open_weights(tmp_path), "neither config.json, config.yaml nor index.json")


def test_every_kind_of_place_holds_the_same(tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released")
    ours = make(tmp_path / "ours", plan_from_hf(released))
    expected = dict(model_tensors(open_model(released)))
    assert expected.keys() >= complete(TINY_LITE).keys()
    for place in (ours, ours / "checkpoints" / "step-0"):
        assert same_bits(dict(model_tensors(open_model(place))), expected)
        assert open_weights(place).config == open_weights(released).config
