"""Adapters merged into weights are the adapted model; PEFT's format carries them out and back bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.config import TuneConfig
from moe.hf.adapter import SETTINGS, WEIGHTS, load_adapter, merge, save_adapter
from moe.hf.inventory import complete, is_adapter, model_tensors
from moe.hf.load import fill
from moe.hf.tensors import Held, Merged
from moe.model.transformer import Transformer
from moe.train.tuning import attach_adapters
from parallel.errors import UserError
from parallel.shards import Piece
from tests.reduced import canonical_parameters
from tests.small import SMALL_MODEL

CONFIG = replace(SMALL_MODEL, q_lora_rank=12)
TUNE = TuneConfig(
    method="lora", lora_rank=4, lora_targets=("attention", "dense", "shared", "experts", "head")
)
EXPERT = "base_model.model.model.layers.2.mlp.experts.7"


def adapted_model(tune: TuneConfig = TUNE, seed: int = 0) -> tuple[Transformer, dict[str, Tensor]]:
    """A model with random adapters, and all its parameters under canonical names."""
    model = Transformer(CONFIG)
    attach_adapters(model, tune)
    tensors = dict(canonical_parameters(model))
    stream = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if is_adapter(name):
            tensor.copy_(torch.randn(tensor.shape, generator=stream) * 0.2)
    return model, tensors


def test_merged_weights_give_the_same_logits() -> None:
    model, tensors = adapted_model()
    plain = Transformer(CONFIG)
    held = Held({**dict(model_tensors(model)), **tensors}.items())
    assert fill(plain, Merged(held, TUNE.lora_scale), Path("memory")) == []
    tokens = torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, alone = model(tokens), Transformer(CONFIG)(tokens)
        assert (plain(tokens) - ours).norm() < 1e-5 * ours.norm() < 1e-5 * 9 * (ours - alone).norm()


def test_a_rectangle_is_merged_by_itself() -> None:
    """A rank reads no more of an adapter than its own part of the weight needs."""
    _, tensors = adapted_model()
    name = "layers.2.moe.experts.7.gate_up.weight"
    weights = Merged(Held(tensors.items()), TUNE.lora_scale)
    whole, part = torch.empty(weights.shape(name)), torch.empty(5, 7)
    weights.read_into(Piece(name, tuple(whole.shape), (0, 0), whole))
    weights.read_into(Piece(name, tuple(whole.shape), (3, 4), part))
    torch.testing.assert_close(part, whole[3:8, 4:11], rtol=1e-6, atol=1e-6)
    assert (whole - tensors[name]).norm() > 0.1 * whole.norm()


def test_a_model_file_holds_no_adapters() -> None:
    assert {name for name, _ in model_tensors(adapted_model()[0])} == {*complete(CONFIG)}


def test_merging_rounds_once() -> None:
    """What bf16 would lose of the product is still there in the sum."""
    weight, down, up = (torch.randn(shape).bfloat16() for shape in ((8, 6), (4, 6), (8, 4)))
    exact = weight.double() + 0.3 * up.double() @ down.double()
    assert torch.equal(merge(weight, down, up, 0.3), exact.float().bfloat16())
    kept = weight.float()
    merge(kept, down, up, 0.3)
    assert torch.equal(kept, weight.float())


def test_out_and_back_bit_for_bit(tmp_path: Path) -> None:
    _, tensors = adapted_model()
    save_adapter(tmp_path / "peft", CONFIG, TUNE, tensors.__getitem__, "some/base")
    other, loaded = adapted_model(seed=1)
    load_adapter(other, TUNE, tmp_path / "peft")
    assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_tensors_have_the_released_modules_names_and_shapes(tmp_path: Path) -> None:
    """Class 2.10: names and shapes unusable in serving (vLLM #41754, SkyRL #1852)."""
    _, tensors = adapted_model()
    save_adapter(tmp_path / "peft", CONFIG, TUNE, tensors.__getitem__, "some/base")
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    width, hidden = CONFIG.moe_intermediate_size, CONFIG.hidden_size
    for module, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        assert stored[f"{EXPERT}.{module}_proj.lora_A.weight"].shape == (4, columns)
        assert stored[f"{EXPERT}.{module}_proj.lora_B.weight"].shape == (rows, 4)
    fused = tensors["layers.2.moe.experts.7.gate_up.lora.up.weight"]
    assert torch.equal(stored[f"{EXPERT}.up_proj.lora_B.weight"], fused[width:])
    assert "base_model.model.lm_head.lora_A.weight" in stored
    assert "base_model.model.model.layers.0.self_attn.kv_a_proj_with_mqa.lora_B.weight" in stored
    assert len(stored) == 2 * (3 * 5 + 3 + 2 * 3 + 2 * 8 * 3 + 1)
    settings = json.loads((tmp_path / "peft" / SETTINGS).read_text())
    assert (settings["peft_type"], settings["task_type"], settings["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (settings["r"], settings["lora_alpha"]) == (4, 32.0)
    assert settings["base_model_name_or_path"] == "some/base"


def exported(folder: Path, tune: TuneConfig) -> tuple[set[str], list[str]]:
    """The released modules that have adapters, and what the settings name them by."""
    _, tensors = adapted_model(tune)
    save_adapter(folder, CONFIG, tune, tensors.__getitem__, None)
    keys = load_file(folder / WEIGHTS)
    modules = {key.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for key in keys}
    return modules, json.loads((folder / SETTINGS).read_text())["target_modules"]


@pytest.mark.parametrize(
    "targets", [("attention",), ("dense",), ("shared",), ("experts",), ("dense", "head")]
)
def test_target_modules_mean_these_modules_and_no_other(tmp_path: Path, targets: tuple) -> None:
    """As PEFT reads a list: a module is meant whose name is, or ends with a dot and, one of it."""
    every, _ = exported(tmp_path / "every", TUNE)
    wanted, ends = exported(tmp_path / "some", replace(TUNE, lora_targets=targets))
    meant = {name for name in every if any(name == end or name.endswith(f".{end}") for end in ends)}
    assert meant == wanted != every
    if targets == ("attention",):
        assert ends == ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]


def setting(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text())
        (folder / SETTINGS).write_text(json.dumps(settings | changes))

    return change


def tensors_by(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS)

    return write


A_KEY, UP_KEY = f"{EXPERT}.gate_proj.lora_A.weight", f"{EXPERT}.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (setting(r=8), "`r` of `.*` must be 4, but is 8: set `tune.lora_rank=8`"),
        (setting(lora_alpha=1), "`lora_alpha` of `.*` must be 32.0, but is 1: set `tune.lora_alpha=1`"),
        (setting(use_dora=True), "`use_dora` of `.*` must be False, but is True: merge it"),
        (tensors_by(lambda held: held.pop(A_KEY)), f"must hold the adapters .* but lacks `{A_KEY}`: "),
        (tensors_by(lambda held: held.update(x=torch.ones(1))), "but has `x`: set `tune.lora_targets`"),
        (tensors_by(lambda held: held[UP_KEY].add_(1)), f"`{A_KEY}` and that of .* must be equal"),
        (
            tensors_by(lambda held: held.update({A_KEY: torch.ones(4, 3), UP_KEY: torch.ones(4, 3)})),
            r"must have shape \(4, 32\), but has \(4, 3\)",
        ),
        (lambda folder: (folder / SETTINGS).unlink(), "must be readable JSON, but is not"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"{}"), "must be a safetensors file, but is not"),
    ],
)
def test_a_folder_that_is_not_ours(tmp_path: Path, spoil: Callable[[Path], object], sentence: str) -> None:
    model, tensors = adapted_model()
    save_adapter(tmp_path / "peft", CONFIG, TUNE, tensors.__getitem__, None)
    spoil(tmp_path / "peft")
    with pytest.raises(UserError, match=sentence):
        load_adapter(model, TUNE, tmp_path / "peft")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    _, tensors = adapted_model()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine").touch()
    with pytest.raises(UserError, match="must be new or empty"):
        save_adapter(tmp_path / "peft", CONFIG, TUNE, tensors.__getitem__, None)
