"""Changed experts out of a run and back into a whole model: they alone differ, to the bit."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import compose
from launch.__main__ import main
from moe.hf import names
from moe.hf.folder import SUMS
from moe.hf.inventory import model_tensors
from moe.hf.load import load
from moe.hf.save import save as save_whole
from moe.model.transformer import Transformer
from moe.selection import FILE
from moe.train.state import Position
from tests.moe.hf.shards import lite_folder
from tests.moe.hf.test_fp8 import released as released_fp8
from tests.moe.train.test_esft import UNEVEN, tuned
from tests.moe.train.test_state import save
from tests.moe.train.test_step import steps

EXPERTS = ("model.layers.1.mlp.experts.3", "model.layers.2.mlp.experts.5")
PARTS = ("gate", "up", "down")


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
    assert main(["convert", "to-esft", str(run), str(adapter)]) == 0
    assert json.loads((adapter / FILE).read_text())["experts"] == dict(UNEVEN)
    changed = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, chosen in UNEVEN.items()
        for expert in chosen
        for part in PARTS
    }
    assert files(adapter).keys() == changed

    assert main(["convert", "merge-esft", str(base), str(adapter), str(whole), "--shard-gb", "6e-5"]) == 0
    assert {path.name for path in whole.iterdir()} == {path.name for path in base.iterdir()}
    assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=whole).returncode == 0
    assert (whole / SUMS).read_text().count("\n") == len(list(whole.iterdir())) - 1
    before, after = files(base), files(whole)
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    model = Transformer(config.model, config.balance, seed=None)
    load(model, whole)
    trained = dict(model_tensors(trainer.model))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model_tensors(model))

    step = run / "checkpoints" / "step-2"  # any checkpoint goes as well
    assert main(["convert", "to-esft", str(step), str(tmp_path / "same")]) == 0
    assert all(torch.equal(tensor, after[name]) for name, tensor in files(tmp_path / "same").items())
    released = tmp_path / "released"  # DeepSeek's adapters leave `model.` out
    released.mkdir()
    short = {name.removeprefix("model."): tensor for name, tensor in files(adapter).items()}
    save_file(short, released / "model.safetensors")
    main(["convert", "merge-esft", str(base), str(released), str(tmp_path / "again")])
    again = files(tmp_path / "again")
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())


def test_an_fp8_base_becomes_bf16(tmp_path: Path) -> None:
    """A changed tensor must not meet the scales of the one whose place it takes."""
    values, (name, other) = released_fp8(tmp_path / "base"), EXPERTS
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    adapter.mkdir()
    changed = {f"{name}.{part}_proj.weight": values[f"{name}.{part}_proj.weight"] * 3 for part in PARTS}
    save_file(changed, adapter / "changed.safetensors")
    assert main(["convert", "merge-esft", str(tmp_path / "base"), str(adapter), str(whole)]) == 0
    after = files(whole)
    assert not any(key.endswith(names.SCALES) for key in after)
    for key, tensor in changed.items():
        assert torch.equal(after[key], tensor.bfloat16())
    assert torch.equal(after[f"{other}.up_proj.weight"], values[f"{other}.up_proj.weight"].bfloat16())


def an_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    if tensors:
        save_file(tensors, folder / "model.safetensors")


GATE = "layers.1.mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (None, "must hold safetensors files, but has none"),
        ({}, "must hold safetensors files, but has none"),
        ({"layers.9.mlp.gate.weight": (1,)}, "but lacks `model.layers.9.mlp.gate.weight`"),
        ({GATE: (1, 2)}, "must have shape (16, 32), but has (1, 2)"),
        ({GATE: (16, 32)}, "up_proj.weight` in `adapter` must have shape (16, 32), but has None"),
        ({f"{GATE}_scale_inv": (1, 1)}, f"but lacks `model.{GATE}_scale_inv`"),
    ],
)
def test_what_does_not_fit(
    tensors: dict[str, tuple[int, ...]] | None,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lite_folder(tmp_path / "base")
    if tensors is not None:
        an_adapter(tmp_path / "adapter", {name: torch.zeros(shape) for name, shape in tensors.items()})
    words = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["convert", "merge-esft", *words]) == 2
    said = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert sentence in said.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_missing_base_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "merge-esft", *(str(tmp_path / name) for name in "abc")]) == 2
    assert "weights must come from" in capsys.readouterr().err
