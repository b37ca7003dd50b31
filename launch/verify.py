"""`switchyard verify`: the proof that a recipe's layout, or every layout of N ranks, trains like one rank.

Here it is decided what is proven, and the ranks are started, once for all cases. What they do stands
in launch/prove.py, and how they are started in launch/together.py. The plan's folder also holds what one rank
alone computed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch import compose
from launch.cases import Plan, single, sweep
from launch.options import Parser
from launch.output import check_json
from launch.shrink import changes, shrink
from launch.together import Together
from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.rules import validate
from parallel.errors import UserError

AGREE, DIFFER = 0, 1


def main(arguments: Sequence[str]) -> int:
    """Prove, and return the exit code: 0 all agree, 1 one does not, 2 the user's input, 130 interrupted."""
    return Together(command="verify", plan=Plan, make_plan=make_plan, prepare=_prepare, run=_prove).main(
        arguments
    )


def _prepare(plan: Plan) -> None:
    prepare(plan.config.data, plan.config.model.vocab_size, print)


def _prove(plan: Plan, folder: Path) -> int:
    from launch.prove import prove

    return AGREE if prove(plan, folder) else DIFFER


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
    """The same run with everything in fp32, which rounding would hide, and by the house's own engine.

    Recorded choices are compared row by row, so rows have one length.
    """
    whole = config.data.packing == "bucket"
    return replace(
        config,
        data=replace(config.data, packing="whole") if whole else config.data,
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
    parser = Parser("verify")
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
