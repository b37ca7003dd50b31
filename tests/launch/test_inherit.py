"""What a new run takes from the weights it begins with, and what the command line may not change."""

from pathlib import Path

import pytest

from launch import compose, train
from moe.config import RunConfig
from parallel.errors import UserError
from tests.moe.hf.shards import TINY_LITE, lite_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, _self_]\nmodel: {num_layers: 9, capacity_factor: 1.5}\ndata: {paths: [text.txt]}\n"
    )
    lite_folder(tmp_path / "released")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments: str) -> train.Plan:
    return train.make_plan(["recipe=mine.yaml", "train.init=released", *arguments])


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
