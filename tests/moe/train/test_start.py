"""`train.init`: the same first loss whatever kind of place, and what a resumed run needs of it."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moe.config import RunConfig, TuneConfig
from moe.hf.convert import plan_from_hf, plan_to_hf
from moe.hf.inventory import complete, in_checkpoint
from moe.hf.load import open_model
from moe.hf.places import noted_origin
from moe.hf.tensors import Layered
from moe.hf.weights import Checkpointed, open_weights
from moe.train import start, state
from moe.train.loop import train
from moe.train.state import Position
from moe.train.step import make_model, make_trainer
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from parallel.groups import single
from parallel.saving import Saver
from tests.moe.hf.shards import TINY_LITE, lite_folder
from tests.moe.hf.test_convert import TINY_V3, make
from tests.moe.train.test_step import steps_from
from tests.small import small_run

CPU = torch.device("cpu")


def run_from(folder: Path, init: Path | None) -> RunConfig:
    config = replace(small_run(folder), model=TINY_LITE)
    init_setting = str(init) if init else None
    return replace(config, train=replace(config.train, init=init_setting, precision="bf16", batch_size=4))


def first_losses(config: RunConfig) -> list[float]:
    config = replace(config, train=replace(config.train, precision="fp32"))
    return [result.loss for result in steps_from(make_trainer(config, single(), 3, CPU), 0, 1)]


def saved_run(folder: Path, config: RunConfig, keep: str = "") -> Path:
    """A run's folder as training leaves it, with one checkpoint; of tensors `model/...` those with `keep`."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(config, single(), 3, CPU)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    if begin := start.new(config.train):
        start.note(folder, begin)
    pieces = [p for p in state.owned(trainer) if keep in p.name or not p.name.startswith("model/")]
    saver = Saver(folder / "checkpoints", None, keep_last=1)
    saver.save(4, pieces, asdict(Position(4)))
    saver.wait()
    return folder


def test_every_kind_of_place_gives_the_same_losses(tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released")
    ours = make(tmp_path / "ours", plan_from_hf(released))
    run = saved_run(tmp_path / "run", run_from(tmp_path, released))
    expected = first_losses(run_from(tmp_path, released))
    assert expected != first_losses(run_from(tmp_path, None))
    for place in (ours, run, run / "checkpoints" / "step-4"):
        assert first_losses(run_from(tmp_path, place)) == expected, place


def test_a_module_that_the_source_lacks_is_drawn_from_the_seed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released = lite_folder(tmp_path / "released")
    config = run_from(tmp_path, released)
    config = replace(config, model=replace(TINY_LITE, num_mtp_layers=1))
    with caplog.at_level(logging.WARNING):
        found = dict(make_model(config, single()).named_parameters())
    assert "has no MTP module 0: its weights are drawn from `train.seed`" in caplog.text
    fresh = dict(
        make_model(replace(config, train=replace(config.train, init=None)), single()).named_parameters()
    )
    trained = dict(open_model(released, dtype=torch.bfloat16).named_parameters())
    for name, parameter in found.items():
        assert torch.equal(parameter, (fresh if name.startswith("mtp.") else trained)[name]), name


def test_another_model_is_refused(tmp_path: Path) -> None:
    config = run_from(tmp_path, lite_folder(tmp_path / "released"))
    for changes, words in (
        ({"num_layers": 4}, "must hold `layers.3."),
        ({"num_layers": 2}, "hold only tensors of the configured model, but has `layers.2."),
        ({"intermediate_size": 48}, r"in shape \(96, 32\), but has it in \(128, 32\)"),
    ):
        with pytest.raises(UserError, match=words):
            make_model(replace(config, model=replace(TINY_LITE, **changes)), single())


def test_a_resumed_run_needs_init_only_for_what_it_never_trained(tmp_path: Path) -> None:
    released = lite_folder(tmp_path / "released")
    config = run_from(tmp_path, released)
    whole, part = saved_run(tmp_path / "whole", config), saved_run(tmp_path / "part", config, "experts.3.")
    everything = open_checkpoint(whole / "checkpoints" / "step-4").names
    trained = open_checkpoint(part / "checkpoints" / "step-4").names
    assert {in_checkpoint(name) for name in complete(TINY_LITE)} - set(trained)
    again = start.resumed(part, config.train, trained)
    assert isinstance(open_weights(part).weights, Layered)
    assert isinstance(open_weights(whole).weights, Checkpointed)
    make_model(config, single(), again)
    moved = tmp_path / "moved"
    released.rename(moved)
    make_model(config, single(), start.resumed(whole, config.train, everything))  # is not asked for it
    with pytest.raises(UserError, match="must exist as long as its run needs it"):
        make_model(config, single(), again)
    with pytest.raises(UserError, match="must exist as long as its run needs it"):
        open_weights(part)
    lite_folder(released, seed=4)
    with pytest.raises(UserError, match="must stay what the run began from"):
        make_model(config, single(), again)
    elsewhere = replace(config, train=replace(config.train, init=str(moved)))  # the same weights
    make_model(elsewhere, single(), start.resumed(part, elsewhere.train, trained))
    assert noted_origin(part) == open_weights(moved).weights.origin != open_weights(released).weights.origin


def test_a_run_without_the_modules_of_what_it_began_from_can_leave(tmp_path: Path) -> None:
    """Its checkpoint holds some experts; all else is read from a model that has an MTP module more."""
    released = lite_folder(tmp_path / "released", TINY_V3)
    config = replace(run_from(tmp_path, released), model=replace(TINY_V3, num_mtp_layers=0))
    run = saved_run(tmp_path / "run", config, "experts.3.")
    found = open_weights(run).weights
    assert isinstance(found, Layered) and set(found.names) == set(complete(config.model))
    make(tmp_path / "out", plan_to_hf(run, tmp_path / "out", None))


def test_a_checkpoint_that_its_run_removed_is_named(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", run_from(tmp_path, None))
    config = run_from(tmp_path, run / "checkpoints" / "step-3")
    with pytest.raises(UserError, match=r"step-3` does not \(its run keeps the newest `train\.keep_checkp"):
        make_model(config, single())


def test_an_adapter_is_read_once(tmp_path: Path) -> None:
    """A resumed run has its adapters in the checkpoint: the folder may be gone."""
    config = run_from(tmp_path, lite_folder(tmp_path / "released"))
    config = replace(config, tune=TuneConfig(method="lora", adapter=str(tmp_path / "gone")))
    saved = ["model/layers.0.attention.output.lora.up.weight"]
    make_model(config, single(), start.resumed(tmp_path, config.train, saved))
    with pytest.raises(UserError, match="must be readable JSON"):
        make_model(config, single())


def test_a_run_leaves_as_what_transformers_computes_alike(tmp_path: Path) -> None:
    """Trained from released files, saved, exported: the same logits."""
    released = lite_folder(tmp_path / "released")
    config = replace(run_from(tmp_path, released), optim=replace(small_run(tmp_path).optim, lr=0.02))
    config = replace(config, balance=replace(config.balance, bias="none"))
    trainer = make_trainer(config, single(), 3, CPU)
    steps_from(trainer, 0, 3)
    run = tmp_path / "run"
    saved_run(run, config)
    saver = Saver(run / "checkpoints", None, keep_last=1)
    saver.save(7, state.owned(trainer), asdict(Position(7)))
    saver.wait()
    out = make(tmp_path / "out", plan_to_hf(run, tmp_path / "out", torch.float32))
    tokens = torch.arange(24)[None] * 7 % 320
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
    ours, before = open_model(run)(tokens), open_model(released)(tokens)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_a_run_begins_goes_on_and_no_longer_asks_for_it(tmp_path: Path) -> None:
    """The loop: noted, trained, saved, resumed with what it began from gone; and begun again from itself."""
    released = lite_folder(tmp_path / "released")
    config = run_from(tmp_path, released)
    settings = replace(config.train, steps=2, save_every=1, eval_every=0, keep_checkpoints=3)
    config = replace(config, train=settings)
    run = tmp_path / "run"
    run.mkdir()
    assert train(config, run) == 0
    assert noted_origin(run) == open_weights(released).weights.origin
    released.rename(tmp_path / "gone")
    assert train(replace(config, train=replace(settings, steps=3)), run) == 0
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(losses)
    with pytest.raises(UserError, match="must exist as long as its run needs it"):
        train(config, tmp_path / "other")
