"""`switchyard convert to-peft` on a run, and a run that begins with what it wrote."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch import compose
from launch.__main__ import main
from launch.train import CONFIG
from moe.config import TuneConfig
from moe.hf.inventory import is_adapter
from moe.train import loop
from moe.train.step import make_model
from parallel.checkpoint import open_latest
from parallel.groups import single
from tests.reduced import canonical_parameters
from tests.small import small_run


def test_a_run_goes_out_and_another_begins_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "write_report", lambda folder: None)  # pictures take long
    run, folder = tmp_path / "run", tmp_path / "peft"
    config = small_run(tmp_path)
    config = replace(
        config,
        tune=TuneConfig(method="lora", lora_rank=2),
        balance=replace(config.balance, bias="frozen"),
        train=replace(config.train, steps=2, eval_every=0),
    )
    run.mkdir()
    (run / CONFIG).write_text(compose.write_yaml(config))
    assert main(["convert", "to-peft", str(run), str(folder)]) == 2
    assert "must hold a checkpoint, but has none" in capsys.readouterr().err
    assert loop.train(config, run) == 0
    assert "trains 5,840 of 69,344 parameters (8.42%)" in capsys.readouterr().err
    assert main(["convert", "to-peft", str(run), str(folder), "--base", "some/base"]) == 0
    out = capsys.readouterr().out
    assert f"adapters of step 2 are in {folder}\nnote: PEFT 0.21" in out and "dense and shared out" in out
    saved = open_latest(run / "checkpoints", print)
    assert saved is not None
    begun = make_model(replace(config, tune=replace(config.tune, adapter=str(folder))), single())
    adapters = {name: tensor for name, tensor in canonical_parameters(begun) if is_adapter(name)}
    assert adapters and all(torch.equal(saved.read(f"model/{n}"), tensor) for n, tensor in adapters.items())
    assert any(tensor.any() for name, tensor in adapters.items() if name.endswith("up.weight"))


def test_other_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "to-peft", str(tmp_path), str(tmp_path / "peft")]) == 2
    assert "has neither config.json, config.yaml nor" in capsys.readouterr().err
    (tmp_path / CONFIG).write_text(compose.write_yaml(small_run(tmp_path)))
    assert main(["convert", "to-peft", str(tmp_path), str(tmp_path / "peft")]) == 2
    assert "must be lora, but is full" in capsys.readouterr().err
    assert main(["convert", "to-peft", str(tmp_path)]) == 2
    assert "the following arguments are required: folder" in capsys.readouterr().err
