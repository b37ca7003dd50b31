"""`switchyard train`: decide what to run, once; then be, or start, the ranks that run it.

Started plainly, this process composes the settings, prepares the data, writes the run's folder and
starts a process per rank, which reads that folder. Under torchrun or srun the ranks are there already:
rank 0 decides in the same way and tells the others. `python -m launch.train` is the same command.
"""

import itertools
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch import compose
from launch.inherit import PLACEMENT, SELECTION, begin_from, go_on, keepsakes, placed
from launch.ranks import AS_RANK, PARTING, Meeting, Ranks, rank_command, started_ranks
from moe.config import RunConfig
from moe.data.corpus import prepare
from moe.hf.places import SETTINGS as CONFIG
from moe.rules import tuning_notes, validate
from moe.telemetry.rows import BadRow, replace_file
from parallel.errors import UserError
from parallel.layout import Layout

RECIPE = "recipe.txt"  # in the folder of a run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to run, and where: `folder` exists already when the run is resumed."""

    config: RunConfig
    layout: Layout
    recipe: str
    folder: Path
    resumes: bool
    notes: tuple[str, ...] = ()  # what its user may not want


def main(arguments: Sequence[str]) -> int:
    """Train, and return the exit code: 0 done, 1 ended badly, 2 the user's input, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training begins, like Ctrl-C
    if arguments[:1] == [AS_RANK]:
        folder = Path(arguments[1])
        return _be_rank(compose.read_yaml(folder / CONFIG), folder, Meeting())
    ranks = started_ranks()
    if "--dry-run" in arguments:
        plan = make_plan([a for a in arguments if a != "--dry-run"], ranks.world_size if ranks else None)
        if ranks is None or ranks.rank == 0:
            print(describe(plan))
        return 0
    return _join_ranks(arguments, ranks) if ranks else _start_here(arguments)


def make_plan(arguments: Sequence[str], world_size: int | None = None) -> Plan:
    """Compose and check the settings and choose the run's folder; touches nothing on disk."""
    named, overrides = compose.take(arguments, ("recipe", "run"))
    recipe = named.get("recipe", "tiny")
    config = compose.from_recipe(recipe, overrides)
    runs = Path(config.launch.runs)
    run = named.get("run") or new_run_name(runs, recipe)
    if not re.fullmatch(r"[^\W_][\w.+=@-]{0,99}", run):
        raise UserError(
            "`run` must be a folder's name of at most 100 letters, digits, `-`, `_` and `.`, but is "
            f"{run[:100]!r}: set `launch.runs` to place it elsewhere"
        )
    folder = runs / run
    resumes = folder.exists()
    notes: tuple[str, ...] = ()
    if resumes:
        recipe = _saved_recipe(folder, named.get("recipe"))
        saved = read_settings(folder)
        config = go_on(saved, compose.from_config(saved, overrides))
        _check_same_model(run, saved, config)
    else:
        if config.optim.begin_step:
            raise UserError(
                f"`optim.begin_step` must be 0 in a new run, but is {config.optim.begin_step}: set it to "
                "go on with a run that ended there"
            )
        config, notes = begin_from(config, overrides)
    layout = validate(config, world_size)
    notes += (*layout.across_nodes(config.cluster.gpus_per_node), *tuning_notes(config))
    return Plan(config=config, layout=layout, recipe=recipe, folder=folder, resumes=resumes, notes=notes)


def new_run_name(runs: Path, recipe: str) -> str:
    """The recipe's name, or with `-2`, `-3`... after it, so that no run of that name exists yet."""
    name = Path(recipe).stem
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if not (runs / n).exists())


def read_settings(folder: Path) -> RunConfig:
    """The settings of a run wherever its folder lies now: selection and placement are its own copies."""
    return _with_own_files(compose.read_yaml(folder / CONFIG), folder)


def _with_own_files(config: RunConfig, folder: Path) -> RunConfig:
    tune, layout = config.tune, config.layout
    if tune.method == "esft":
        tune = replace(tune, selection=str(folder.resolve() / SELECTION))
    if layout.placement is not None:
        layout = replace(layout, placement=str(folder.resolve() / PLACEMENT))
    return replace(config, tune=tune, layout=layout)


def _saved_recipe(folder: Path, wanted: str | None) -> str:
    for name in (CONFIG, RECIPE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} exists but holds no {name}: choose another `run=` or remove the folder"
            )
    saved = (folder / RECIPE).read_text(encoding="utf-8").strip()
    if wanted not in (None, saved):
        raise UserError(
            f"run `{folder.name}` was begun from recipe `{saved}`, not `{wanted}`: leave `recipe=` out to "
            "resume it, or choose another `run=`"
        )
    return saved


def _check_same_model(run: str, saved: RunConfig, wanted: RunConfig) -> None:
    """A run's weights have one shape and dtype from its first step on, and the same are trained."""
    before, now = asdict(saved), asdict(wanted)
    changed = [
        (f"{group}.{key}", was, now[group][key])
        for group in ("model", "tune")
        for key, was in before[group].items()
        if was != now[group][key]
    ]
    if saved.train.dtype != wanted.train.dtype:
        changed.append(("train.precision", saved.train.precision, wanted.train.precision))
    if saved.tune.is_partial and wanted.train.init is None:
        changed.append(("train.init", saved.train.init, None))
    for field, was, is_now in changed:
        raise UserError(
            f"`{field}` of run `{run}` must stay {was}, but is {is_now}: leave it out to resume, or choose "
            "another `run=`"
        )


def describe(plan: Plan) -> str:
    """The settings as YAML, with the run and its launch in comments above."""
    what = "resumed" if plan.resumes else "new"
    command = shlex.join(rank_command("train", plan.folder))
    notes = "".join(f"# note: {note}\n" for note in plan.notes)
    return (
        f"# run {plan.folder} ({what}), recipe {plan.recipe}\n"
        f"# launch {plan.layout.world_size} x {command}\n{notes}{compose.write_yaml(plan.config)}"
    ).rstrip()


def _start_here(arguments: Sequence[str]) -> int:
    plan = make_plan(arguments)
    _begin(plan)
    from launch.local import start_ranks  # imports torch

    return start_ranks(plan.layout.world_size, rank_command("train", plan.folder), plan.config.launch.threads)


def _join_ranks(arguments: Sequence[str], ranks: Ranks) -> int:
    meeting = Meeting()
    if ranks.rank > 0:
        decision = meeting.listen()
        if "error" in decision:  # rank 0 prints it
            return 2
        return _be_rank(compose.parse_yaml(decision["config"]), Path(decision["folder"]), meeting)
    try:
        plan = make_plan(arguments, ranks.world_size)
        config = _begin(plan)
    except UserError as error:
        meeting.announce({"error": str(error)})
        raise
    meeting.announce({"folder": str(plan.folder), "config": compose.write_yaml(config)})
    return _be_rank(config, plan.folder, meeting)


def _begin(plan: Plan) -> RunConfig:
    """Prepare the data and verify the weights, then write the run's folder; the settings in it.

    A mistake in either leaves no folder behind.
    """
    for note in plan.notes:
        print(f"note: {note}", flush=True)
    corpus = prepare(plan.config.data, plan.config.model.vocab_size, print)
    kept = {} if plan.resumes else keepsakes(plan.config, corpus.tokenizer_path)
    kept |= placed(plan.config)
    if plan.config.train.init is not None and not plan.resumes:
        from moe.hf.convert import verified  # imports torch

        verified(Path(plan.config.train.init))
    config = _with_own_files(plan.config, plan.folder)
    try:
        plan.folder.mkdir(parents=True, exist_ok=plan.resumes)
        for name, content in kept.items():
            (plan.folder / name).parent.mkdir(exist_ok=True)
            replace_file(plan.folder / name, content)
        replace_file(plan.folder / RECIPE, f"{plan.recipe}\n".encode())
        replace_file(plan.folder / CONFIG, compose.write_yaml(config).encode())
        if config.layout.placement is None:
            (plan.folder / PLACEMENT).unlink(missing_ok=True)  # of experts that are in order again
    except OSError as error:
        raise UserError(
            f"cannot write {plan.folder} ({error.strerror}): set `run=` or `launch.runs`"
        ) from None
    return config


def _be_rank(config: RunConfig, folder: Path, meeting: Meeting) -> int:
    from torch import set_num_threads

    from moe.train.loop import train

    if config.launch.threads is not None:  # torchrun and srun know nothing of this setting
        set_num_threads(config.launch.threads)
    try:
        code = train(config, folder)
    except (UserError, BadRow) as error:
        if meeting.is_first(str(error)):
            print(f"switchyard: {error}", file=sys.stderr)
        code = 2
    if code != 0:
        meeting.part(PARTING)
    return code


if __name__ == "__main__":
    from launch.__main__ import main as command_line

    sys.exit(command_line(["train", *sys.argv[1:]]))
