"""Settings from recipes, saved runs and overrides; every mistake is one sentence."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch import compose
from moe.config import RunConfig
from parallel.errors import UserError

HEAD = "defaults: [base, _self_]\n"


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(HEAD + "optim: {lr: 1e-2}\ndata: {paths: [a, b]}\n")
    (folder / "small.yaml").write_text("defaults: [tiny, _self_]\nmodel: {num_layers: 6}\n")
    monkeypatch.setattr(compose, "RECIPES", folder)
    return folder


def test_recipe_then_overrides() -> None:
    config = compose.from_recipe(
        "tiny", ["model.q_lora_rank=64", "optim.warmup_steps=3", "data.tokenizer=x.json"]
    )
    assert config.optim.lr == 0.01
    assert config.data.paths == ("a", "b")
    assert config.model.q_lora_rank == 64
    assert config.optim.warmup_steps == 3
    assert config.train == RunConfig().train


def test_null_is_none_and_interpolation_resolves() -> None:
    config = compose.from_recipe(
        "tiny", ["layout.dp=null", "layout.ep=${model.num_heads}", "model.num_heads=8"]
    )
    assert config.layout.dp is None
    assert config.layout.ep == 8


def test_a_recipe_may_build_on_another() -> None:
    config = compose.from_recipe("small")
    assert (config.model.num_layers, config.optim.lr) == (6, 0.01)


def test_a_deleted_key_falls_back_to_its_default() -> None:
    assert compose.from_recipe("tiny", ["~optim.lr"]).optim.lr == RunConfig().optim.lr


def test_a_recipe_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "train: {steps: 7}\n")
    assert compose.from_recipe(str(path)).train.steps == 7


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = compose.from_recipe("tiny", ["model.rms_norm_eps=1e-8", "train.sample_prompt='12:30'"])
    path = tmp_path / "config.yaml"
    path.write_text(compose.write_yaml(config))
    assert compose.read_yaml(path) == config
    assert compose.parse_yaml(path.read_text()) == config
    assert "!!" not in path.read_text()


def test_saved_settings_are_the_base(tmp_path: Path) -> None:
    saved = compose.from_recipe("tiny", ["train.steps=7"])
    path = tmp_path / "config.yaml"
    path.write_text(compose.write_yaml(saved))
    resumed = compose.from_config(compose.read_yaml(path), ["train.seed=5"])
    assert resumed == replace(saved, train=replace(saved.train, seed=5))
    assert compose.from_recipe("small").train.steps == RunConfig().train.steps  # the base is not kept


def test_take_leaves_overrides() -> None:
    taken, overrides = compose.take(["recipe=a", "model.top_k=2", "run=b"], ("recipe", "run"))
    assert taken == {"recipe": "a", "run": "b"}
    assert overrides == ["model.top_k=2"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "no setting `optim.lrr`: did you mean `optim.lr`"),
        ("train.lr=1", "no setting `train.lr`: did you mean `optim.lr`"),
        ("+model.new=1", "no setting `model.new`"),
        ("hydra.verbose=true", "no setting `hydra.verbose`"),
        ("model.num_layers=four", "`model.num_layers` must be an integer, but is 'four'"),
        ("model.num_layers=2.5", "`model.num_layers` must be an integer, but is 2.5"),
        ("optim.lr=", "`optim.lr` must be a number, but is ''"),
        ("optim.lr=true", "`optim.lr` must be a number, but is True"),
        ("layout.overlap=2", "`layout.overlap` must be true or false, but is 2"),
        ("train.precision=fp16", "`train.precision` must be 'fp32' or 'bf16' or 'fp8', but is 'fp16'"),
        ("model=large", "`model` must be a group of settings, but is 'large'"),
        ("model.rope=null", "`model.rope` must be a group of settings, but is None"),
        ("train.steps=1,2", "`train.steps=1,2` names several values, but a run takes one"),
        ("train.steps=range(1,3)", "names several values"),
        ("data.paths=[a", "cannot read `data.paths=[a`"),
        ("train.steps", "cannot read `train.steps`"),
        ("", "cannot read ``"),
        ("=3", "`=3` names no setting"),
        ("--steps=3", "there is no option `--steps=3`"),
        ("train.steps=${nowhere}", "cannot compose `tiny` (Interpolation key 'nowhere' not found)"),
    ],
)
def test_wrong_overrides(override: str, sentence: str) -> None:
    assert sentence in one_sentence(lambda: compose.from_recipe("tiny", [override]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (HEAD + "optim:\n  lr: [1\n  eps: 2\n", "bad.yaml, line 4 is not YAML"),
        (
            HEAD + "optim: {lr: 1}\noptim: {lr: 2}\n",
            "bad.yaml, line 3 is not YAML (found duplicate key optim)",
        ),
        (HEAD + "optm: {lr: 1}\n", "no setting `optm`: did you mean `optim`?"),
        (HEAD + "optim: {lrr: 1}\n", "no setting `optim.lrr`: did you mean `optim.lr`?"),
        (HEAD + "optim: {lr: fast}\n", "`optim.lr` must be a number, but is 'fast'"),
        (HEAD + "optim:\n", "`optim` must be a group of settings, but is None"),
        ("optim: {lr: 1}\n", "begin it with `defaults: [base, _self_]`"),
        ("", "begin it with `defaults: [base, _self_]`"),
        ("- 1\n- 2\n", "but holds a list"),
        ("defaults: [bass, _self_]\n", "cannot compose `bad`"),
        (HEAD + "train: {steps: 0x}\n", "`train.steps` must be an integer, but is '0x'"),
    ],
)
def test_wrong_recipes(recipes: Path, text: str, sentence: str) -> None:
    (recipes / "bad.yaml").write_text(text)
    assert sentence in one_sentence(lambda: compose.from_recipe("bad"))


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("tinny", "no recipe `tinny`: did you mean `tiny`, of small, tiny?"),
        ("./none.yaml", "no recipe file `./none.yaml`"),
        ("notes.yml", "must end in `.yaml`"),
    ],
)
def test_unknown_recipes(recipe: str, sentence: str) -> None:
    assert sentence in one_sentence(lambda: compose.from_recipe(recipe))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=a", "run=b"], "`run=` is given twice, as 'a' and 'b'"),
        (["recipe="], "`recipe=` names nothing"),
    ],
)
def test_wrong_words(arguments: list[str], sentence: str) -> None:
    assert sentence in one_sentence(lambda: compose.take(arguments, ("recipe", "run")))


def one_sentence(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_a_cluster_is_named_under_other_overrides(recipes: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[2] / "recipes" / "cluster", recipes / "cluster")
    config = compose.from_recipe("tiny", ["cluster.gpus_per_node=4", "cluster=h800x8"])
    assert vars(config.cluster) == {
        "name": "h800x8",
        "gpus_per_node": 4,
        "memory_gb": 80.0,
        "peak_tflops": 989.4,
    }
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [base, _self_]\ncluster: {name: mine, memory_gb: 40}\n")
    assert compose.from_recipe(str(path)).cluster.memory_gb == 40.0
    assert compose.from_recipe(str(path), ["cluster=local"]).cluster == RunConfig().cluster
    saved = tmp_path / "config.yaml"
    saved.write_text(compose.write_yaml(config))
    assert compose.from_config(compose.read_yaml(saved), ["cluster=a800x8"]).cluster.peak_tflops == 312.0
