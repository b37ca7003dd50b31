"""What a new run takes from the weights it begins with, and what the command line may not change."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch import compose, train
from launch.inherit import _companions, begin_from
from moe.config import DataConfig, RunConfig
from moe.data.template import read_template
from moe.hf.convert import plan_from_hf
from moe.hf.folder import companions
from moe.train import state
from moe.train.state import Position
from moe.train.step import make_trainer
from moe.train.tuning import selection_of
from parallel.errors import UserError
from parallel.groups import single
from parallel.saving import Saver
from tests.moe.hf.shards import TINY_LITE, damage, lite_folder
from tests.moe.hf.test_convert import make
from tests.moe.train.test_start import CPU, run_from, saved_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, _self_]\nmodel: {num_layers: 9, capacity_factor: 1.5}\ndata: {paths: [text.txt]}\n"
    )
    (tmp_path / "text.txt").write_text("a few words of text, and some more\n" * 200)
    lite_folder(tmp_path / "released")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments: str) -> train.Plan:
    return train.make_plan(["recipe=mine.yaml", "train.init=released", *arguments])


def begin(*arguments: str) -> train.Plan:
    made = plan("balance.bias=frozen", *arguments)
    return replace(made, config=train._begin(made))


@pytest.fixture
def base(here: Path) -> Path:
    """A run that may go on training."""
    folder = saved_run(here / "base", run_from(here, here / "released"))
    (folder / "hf").mkdir()
    shutil.copy(here / "released" / "tokenizer.json", folder / "hf")
    return folder


def test_model_and_tokenizer_are_those_of_the_weights(here: Path) -> None:
    made = plan()
    found = made.config.model
    assert found.num_layers == 3 and found.score_function == "softmax" and found.rope.kind == "yarn"
    assert found.capacity_factor == 1.5  # of training, not of the weights
    assert made.config.train.init == str(here / "released")
    assert made.config.data.tokenizer == str(here / "released" / "tokenizer.json")
    assert any("`balance.bias` is 'update', but 'none' in" in note for note in made.notes)
    assert compose.parse_yaml(compose.write_yaml(made.config)) == made.config


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ("model.num_mtp_layers=1", "num_mtp_layers", 1),
        ("model.capacity_factor=2.0", "capacity_factor", 2.0),
        ("model.init_std=0.01", "init_std", 0.01),
        ("model.max_context=1000", "max_context", 1000),
        ("model.num_layers=3", "num_layers", 3),
    ],
)
def test_what_may_be_given(here: Path, given: str, field: str, value: object) -> None:
    assert getattr(plan(given).config.model, field) == value


def test_context_is_extended_from_the_command_line(here: Path) -> None:
    """One setting of RoPE; the others stay those of the weights."""
    found = plan("model.rope.factor=80").config.model.rope
    assert found.factor == 80 and (found.kind, found.mscale) == ("yarn", TINY_LITE.rope.mscale)


def test_another_model_is_refused(here: Path) -> None:
    with pytest.raises(UserError, match=r"`model\.num_layers` must be 3 as in `train\.init=.*`, but is 4"):
        plan("model.num_layers=4")


def test_a_tokenizer_is_not_guessed(here: Path) -> None:
    (here / "released" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"`data\.tokenizer` must name the tokenizer of the weights"):
        plan()
    assert plan("data.tokenizer=other.json").config.data.tokenizer == "other.json"


def test_without_init_nothing_changes(here: Path) -> None:
    made = train.make_plan(["recipe=mine.yaml"])
    assert made.config.model.num_layers == 9 and made.config.data.tokenizer is RunConfig().data.tokenizer


def test_a_run_stands_for_its_newest_checkpoint(base: Path) -> None:
    """Which stays the one that was the newest, though the same command is given again."""
    words = ("run=lora", "train.init=base", "tune.method=lora")
    began = begin(*words)
    assert began.config.train.init == str(base / "checkpoints" / "step-4")
    saver = Saver(base / "checkpoints", None, keep_last=9)
    trainer = make_trainer(run_from(base.parent, None), single(), 3, CPU)
    saver.save(8, state.owned(trainer), asdict(Position(8)))
    saver.wait()
    assert plan(*words).config.train.init == began.config.train.init
    assert plan("train.init=base").config.train.init == str(base / "checkpoints" / "step-8")
    with pytest.raises(UserError, match=r"`train\.init` of run `lora` must stay .*step-4, but is None"):
        plan("run=lora", "train.init=null")


def test_a_resumed_runs_paths_are_absolute(here: Path) -> None:
    """Another place for what it began from, as when it was moved."""
    begin("run=first")
    (here / "released").rename(here / "moved")
    assert plan("run=first", "train.init=moved").config.train.init == str(here / "moved")


def test_weights_are_verified_before_there_is_a_run(base: Path) -> None:
    damage(next((base / "checkpoints" / "step-4").glob("*.safetensors")))
    with pytest.raises(UserError, match="does not match its checksum"):
        begin("train.init=base")
    assert not Path("runs").exists()


def test_a_run_keeps_the_selection_that_it_began_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited, deleted or given again; and in whatever folder its own lies."""
    chosen = {"1": [0, 3], "2": [5]}
    Path("law.json").write_text(json.dumps({"experts": chosen}))
    words = ("run=esft", "tune.method=esft", "tune.selection=law.json")
    began = begin(*words).config
    assert began.tune.selection == str(here / "runs" / "esft" / "selection.json")
    assert compose.read_yaml(here / "runs" / "esft" / "config.yaml") == began
    assert plan(*words).config.tune == began.tune
    Path("law.json").write_text(json.dumps({"experts": {"1": [0], "2": [5]}}))
    with pytest.raises(UserError, match=r"`tune\.selection` of run `esft` must stay"):
        plan(*words)
    Path("law.json").unlink()
    (here / "elsewhere").mkdir()
    (here / "runs").rename(here / "elsewhere" / "runs")
    monkeypatch.chdir(here / "elsewhere")
    selection = selection_of(train.make_plan(["run=esft"]).config)
    assert selection is not None and selection.experts == {"1": (0, 3), "2": (5,)}


def test_a_wrong_selection_leaves_no_folder(here: Path) -> None:
    with pytest.raises(UserError, match="a selection of experts must be a file"):
        begin("tune.method=esft", "tune.selection=nowhere.json")
    assert not Path("runs").exists()


@pytest.mark.parametrize("tune", ["tune.method=lora", "tune.frozen=[router]"])
def test_frozen_weights_come_from_somewhere(here: Path, tune: str) -> None:
    with pytest.raises(UserError, match=r"^`train\.init` must name the weights of which `tune` leaves some"):
        plan("train.init=null", tune)
    with pytest.raises(UserError, match=r"^`model\.num_mtp_layers` must be at most 0 as in .*, but is 1: "):
        plan("model.num_mtp_layers=1", tune)


def test_another_models_name_is_refused_in_few_words(here: Path) -> None:
    Path("lite.yaml").write_text("defaults: [base, model: deepseek_v2_lite, _self_]\n")
    words = ["recipe=lite.yaml", "train.init=released"]
    train.make_plan(words)
    with pytest.raises(UserError) as caught:
        train.make_plan([*words, "model=moonlight"])
    assert str(caught.value) == (
        f"`model` must be that of `train.init={here / 'released'}`, but is another: leave it out to train "
        "that model"
    )


def test_the_recipe_finds_tokenizer_and_template_of_a_converted_folder(here: Path) -> None:
    ours = make(here / "ours", plan_from_hf(here / "released"))
    words = [f"train.init={ours}"]
    data = begin_from(compose.from_recipe("deepseek_v2_lite_sft", words), words)[0].data
    assert data.tokenizer == str(ours / "hf" / "tokenizer.json")
    assert read_template(data.template, data.tokenizer).source == "{{ messages }}"


def test_a_run_keeps_what_its_exports_take_along(here: Path) -> None:
    """All that lies beside the weights with their tokenizer; with another one what belongs to that."""
    kept = begin("run=theirs").folder / "hf"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        path.name: path.read_bytes() for path in companions(here / "released")
    }
    (here / "own").mkdir()
    shutil.copy(here / "released" / "tokenizer.json", here / "own" / "mine.json")
    for name in ("tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (here / "own" / name).write_text("{}")
    kept = begin("run=own", "data.tokenizer=own/mine.json").folder / "hf"
    assert {path.name for path in kept.iterdir()} == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }


def test_a_template_that_is_named_goes_along(here: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        Path(name).write_text("{}")
    trained, own = Path("cache/tokenizer.json"), Path("tokenizer.json")

    def found(**settings: str) -> dict[str, Path]:
        return _companions(DataConfig(format="chat", packing="whole", **settings), trained, None)  # type: ignore[arg-type]

    assert found() == {"tokenizer.json": trained}
    assert found(template="t.jinja") == {"tokenizer.json": trained, "chat_template.jinja": Path("t.jinja")}
    assert found(tokenizer="tokenizer.json", template="t.json") == {
        "tokenizer.json": own,
        "tokenizer_config.json": Path("t.json"),  # and no template that would stand above it
    }
