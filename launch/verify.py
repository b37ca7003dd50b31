"""`switchyard verify`: the proof that a recipe's layout, or every layout of N ranks, trains like one rank.

Here it is decided what is proven, and the ranks are started, once for all cases. What they do stands
in launch/prove.py. A temporary folder holds the plan and what one rank alone computed; it must be seen
by all ranks, so where ranks were started already it lies in `data.cache`.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from launch import compose
from launch.cases import Plan, single, sweep
from launch.handover import hand_over, take_over
from launch.output import check_json
from launch.ranks import AS_RANK, PARTING, Meeting, Ranks, rank_command, started_ranks
from launch.shrink import changes, shrink
from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.rules import validate
from parallel.errors import UserError

PASSED = "passed"  # in the temporary folder, where all agree
AGREE, DIFFER, WRONG_INPUT = 0, 1, 2


def main(arguments: Sequence[str]) -> int:
    """Prove, and return the exit code: 0 all agree, 1 one does not, 2 the user's input, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments[:1] == [AS_RANK]:
        return _be_local_rank(Path(arguments[1]))
    ranks = started_ranks()
    return _join_ranks(arguments, ranks) if ranks else _start_here(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `switchyard verify --help` says how it is used")


def make_plan(arguments: Sequence[str], world_size: int | None = None) -> Plan:
    """Compose the settings and choose the cases. `world_size`: ranks that were started already."""
    options, rest = _parse(arguments, world_size)
    named, overrides = compose.take(rest, ("recipe",))
    recipe = named.get("recipe", "tiny")
    given = compose.from_recipe(recipe, overrides)
    config = in_fp32(given)
    notes = [f"computed in fp32, where differences show: {changes(given, config)}"] if config != given else []
    if options.sweep:
        every = options.ranks  # tp x cp is at most all of them
        # With the schedule that asks for the most layers.
        degrees = LayoutConfig(tp=every, pp=every, dp=every, ep=every, etp=every, schedule="dualpipev")
    else:
        degrees = replace(config.layout, dp=validate(config, options.ranks).dp)
    if options.shrink:
        before, config = config, shrink(config, degrees)
        notes.append(f"shrunk: {changes(before, config) or 'nothing, it is small already'}")
    if options.sweep:
        cases, left_out = sweep(config, options.ranks, full=options.full)
        notes += [f"left out {count} layouts: {reason}" for reason, count in left_out.items()]
    else:
        cases = [single(config, options.ranks)]
    if not cases:
        raise UserError(
            f"`--ranks` must allow a layout, but recipe `{recipe}` has none of {options.ranks} ranks: choose "
            "another number"
        )
    return Plan(
        config=config,
        cases=tuple(cases),
        ranks=cases[0].degrees.world_size,
        steps=options.steps,
        notes=tuple(notes),
        json=str(options.json.resolve()) if options.json else None,
    )


def in_fp32(config: RunConfig) -> RunConfig:
    """The same run with everything in fp32, which rounding would hide, and by the house's own engine."""
    return replace(
        config,
        train=replace(config.train, precision="fp32"),
        optim=replace(
            config.optim,
            grad_reduce="fp32",
            moments="fp32",
            engine="switchyard",
            zero_stage=1,
            offload=False,
        ),
    )


def _parse(arguments: Sequence[str], world_size: int | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="switchyard verify", allow_abbrev=False, add_help=False)
    for flag in ("--sweep", "--full", "--shrink"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--ranks", type=int, default=world_size)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args(arguments)
    for name in ("ranks", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"`--{name}` must be at least 1, but is {value}: use 1 or more")
    if world_size not in (None, options.ranks):
        raise UserError(
            f"`--ranks` must be the number of ranks that were started, but is {options.ranks} and "
            f"{world_size} were: leave it out"
        )
    if options.sweep and options.ranks is None:
        raise UserError("`--sweep` takes every layout of so many ranks, but has no number: add `--ranks 4`")
    if options.full and not options.sweep:
        raise UserError("`--full` says how to sweep, but `--sweep` is not given: add it")
    check_json(options.json)
    return options, rest


def _start_here(arguments: Sequence[str]) -> int:
    plan = make_plan(arguments)
    prepare(plan.config.data, plan.config.model.vocab_size, print)
    from launch.local import start_ranks  # imports torch

    with hand_over(plan) as folder:
        code = start_ranks(plan.ranks, rank_command("verify", folder), plan.config.launch.threads)
        return code or (AGREE if (folder / PASSED).exists() else DIFFER)


def _be_local_rank(folder: Path) -> int:
    """One of the ranks that were started here. A difference is no failure of a rank: a file tells."""
    _die_of_signals()
    code = _be_rank(folder, Meeting())
    if code == AGREE:
        (folder / PASSED).touch()
    return AGREE if code == DIFFER else code


def _join_ranks(arguments: Sequence[str], ranks: Ranks) -> int:
    meeting = Meeting()
    if ranks.rank > 0:
        _die_of_signals()
        decision = meeting.listen()
        return WRONG_INPUT if "error" in decision else _be_rank(Path(decision["folder"]), meeting)
    try:
        plan = make_plan(arguments, ranks.world_size)
        prepare(plan.config.data, plan.config.model.vocab_size, print)
    except UserError as error:
        meeting.announce({"error": str(error)})
        raise
    with hand_over(plan, Path(plan.config.data.cache).expanduser()) as folder:
        meeting.announce({"folder": str(folder)})
        return _be_rank(folder, meeting)


def _die_of_signals() -> None:
    """A rank that waits for others inside a collective would not hear of a Ctrl-C; it has nothing to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _be_rank(folder: Path, meeting: Meeting) -> int:
    from torch import set_num_threads

    from launch.prove import prove

    plan = take_over(Plan, folder)
    if plan.config.launch.threads is not None:  # torchrun and srun know nothing of this setting
        set_num_threads(plan.config.launch.threads)
    try:
        code = AGREE if prove(plan, folder) else DIFFER
    except UserError as error:
        if meeting.is_first(str(error)):
            print(f"switchyard: {error}", file=sys.stderr)
        code = WRONG_INPUT
    if code != AGREE:
        meeting.part(PARTING)
    return code
