"""What `train` decides before a rank starts: the run's name, its folder, its settings."""

from pathlib import Path

import pytest

from launch import compose, train
from parallel.errors import UserError
from tests.moe.hf.shards import lite_folder

RUN = ["model.vocab_size=300", "train.steps=4"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("tiny", "other"):
        (recipes / f"{name}.yaml").write_text("defaults: [base, _self_]\ndata: {paths: [text.txt]}\n")
    (tmp_path / "text.txt").write_text("a few words of text, and some more\n" * 200)
    monkeypatch.setattr(compose, "RECIPES", recipes)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def begin(*arguments: str) -> train.Plan:
    plan = train.make_plan([*RUN, *arguments])
    train._begin(plan)
    return plan


def test_new_runs_are_numbered() -> None:
    assert [begin().folder.name for _ in range(3)] == ["tiny", "tiny-2", "tiny-3"]
    assert begin("recipe=other").folder == Path("runs/other")


def test_a_recipe_path_names_its_run_by_its_stem(tmp_path: Path) -> None:
    assert train.new_run_name(tmp_path, "some/where/mine.yaml") == "mine"


def test_a_plan_touches_nothing(here: Path) -> None:
    before = set(here.rglob("*"))
    plan = train.make_plan([*RUN, "run=first", "launch.runs=elsewhere"])
    assert plan.folder == Path("elsewhere/first")
    assert set(here.rglob("*")) == before


def test_a_begun_run_holds_its_settings_and_is_whole() -> None:
    plan = begin("run=first", "optim.lr=0.5")
    assert not plan.resumes
    assert sorted(path.name for path in plan.folder.iterdir()) == ["config.yaml", "hf", "recipe.txt"]
    assert compose.read_yaml(plan.folder / "config.yaml") == plan.config


def test_resuming_merges_overrides_into_saved_settings() -> None:
    begin("recipe=other", "run=first", "optim.lr=0.5")
    plan = train.make_plan(["run=first", "train.seed=9"])
    assert plan.resumes and plan.recipe == "other"
    assert (plan.config.optim.lr, plan.config.train.steps, plan.config.train.seed) == (0.5, 4, 9)


def test_resuming_under_the_same_recipe_is_fine_and_under_another_is_not() -> None:
    begin("recipe=other", "run=first")
    assert train.make_plan(["recipe=other", "run=first"]).resumes
    with pytest.raises(UserError, match="run `first` was begun from recipe `other`, not `tiny`"):
        train.make_plan(["recipe=tiny", "run=first"])


@pytest.mark.parametrize("run", ["a/b", "..", ".", "x" * 300, "a\nb", "--x"])
def test_a_run_is_one_folder(run: str) -> None:
    with pytest.raises(UserError, match="`run` must be a folder's name of at most 100 letters"):
        train.make_plan([f"run={run}"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.hidden_size=64", "`model.hidden_size` of run `first` must stay 256, but is 64: "),
        ("train.precision=bf16", "`train.precision` of run `first` must stay fp32, but is bf16: "),
        ("tune.frozen=[head]", r"`tune.frozen` of run `first` must stay \(\), but is \('head',\): "),
    ],
)
def test_a_resumed_model_keeps_its_shape(here: Path, override: str, sentence: str) -> None:
    """And the refused command leaves the run's settings as they were."""
    folder = begin("run=first").folder
    before = (folder / train.CONFIG).read_text()
    with pytest.raises(UserError, match=f"^{sentence}"):
        begin("run=first", override)
    assert (folder / train.CONFIG).read_text() == before


def test_useless_losses_are_noted(here: Path) -> None:
    lite_folder(here / "released")
    wanted = ["train.init=released", "tune.method=lora", "balance.bias=none", "balance.global_aux=0.1"]
    notes = train.make_plan(wanted).notes
    assert any(note.startswith("`balance.global_aux` cannot move routers that are frozen") for note in notes)


def test_incomplete_saved_settings(here: Path) -> None:
    """They are not filled with defaults: the run would go on as another."""
    folder = begin("run=first").folder
    (folder / train.CONFIG).write_text("model: {num_layers: 3}\n")
    with pytest.raises(UserError, match="must hold every setting of its run, but lacks `balance`"):
        begin("run=first")


def test_a_strange_folder_is_left_alone(here: Path) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="exists but holds no"):
        train.make_plan(["run=mine"])


def test_a_mistake_in_the_data_leaves_no_folder(here: Path) -> None:
    with pytest.raises(UserError):
        begin("data.paths=[nowhere.txt]")
    assert not (here / "runs").exists()


def test_a_place_that_cannot_be_written_is_told(here: Path) -> None:
    (here / "file").touch()
    with pytest.raises(UserError, match=r"cannot write file/tiny \(Not a directory\)"):
        begin("launch.runs=file")


def test_world_size_is_checked_and_decides_the_layout() -> None:
    assert train.make_plan(RUN, world_size=4).layout.dp == 4
    with pytest.raises(UserError, match="the layout needs 4 and 2 were started"):
        train.make_plan([*RUN, "layout.dp=4"], world_size=2)


def test_dry_run_prints_yaml_that_reads_back(capsys, here: Path) -> None:
    before = set(here.rglob("*"))
    assert train.main([*RUN, "layout.ep=2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert compose.parse_yaml(out) == compose.from_recipe("tiny", [*RUN, "layout.ep=2"])
    assert "# run runs/tiny (new), recipe tiny\n# launch 2 x " in out
    assert set(here.rglob("*")) == before


def test_a_new_run_begins_its_schedule_at_once() -> None:
    with pytest.raises(UserError, match=r"`optim\.begin_step` must be 0 in a new run, but is 3"):
        begin("run=x", "optim.begin_step=3")
