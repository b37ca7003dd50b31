"""`switchyard select-experts`: score a model's experts, and write which of them to train.

The scores come from running the model over a sample of data, or from what a run recorded as it trained.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.chosen import choose, count, describe, recorded_scores, write_selection
from launch.options import Parser
from launch.output import check_out
from launch.together import Together
from launch.use import settings
from moe.config import RunConfig
from moe.data.corpus import prepare
from parallel.errors import UserError

THRESHOLDS = {"token": 0.2, "gate": 0.1}  # of the paper


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is scored, how, and where the result goes."""

    config: RunConfig
    ranks: int
    score: Literal["token", "gate"]
    threshold: float
    sequences: int
    out: str


def main(arguments: Sequence[str]) -> int:
    """Score and write; the exit code: 0 done, 2 the user's input, 130 interrupted."""
    if "--recorded" in arguments:
        return by_record(arguments)
    if "--domain" in arguments:
        raise UserError("`--domain` must come with `--recorded`, but stands alone: give both, or neither")
    return Together(
        command="select-experts", plan=Plan, make_plan=make_plan, prepare=_prepare, run=_select
    ).main(arguments)


def make_plan(arguments: Sequence[str], world_size: int | None = None) -> Plan:
    """Compose and check the settings. Text is cut into tokens as the model's own was."""
    parser = _parser()
    parser.add_argument("--sequences", type=int, default=32)
    options, overrides = parser.parse_known_args(arguments)
    threshold = _threshold(options)
    if options.sequences < 1:
        raise UserError(f"`--sequences` must be at least 1, but is {options.sequences}: use 32")
    config, ranks = settings(options.model, overrides, world_size)
    return Plan(
        config=config,
        ranks=ranks,
        score=options.score,
        threshold=threshold,
        sequences=options.sequences,
        out=str(options.out.resolve()),
    )


def by_record(arguments: Sequence[str]) -> int:
    """Score by what a run recorded. Nothing runs."""
    parser = _parser()
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--domain")
    options = parser.parse_args(arguments)
    threshold = _threshold(options)
    if options.domain is not None and options.score == "gate":
        raise UserError(
            "`--score` must be token with `--domain`, since gates are not recorded by domain, but is gate: "
            "leave one of the two out"
        )
    config, scores = recorded_scores(Path(options.model), options.domain)
    if options.score == "gate" and not scores.gate:
        raise UserError(
            f"`--score` must be token where a run recorded no gates, but is gate, and {options.model} has "
            "none: leave it out"
        )
    chosen = choose(scores, options.score, threshold)
    write_selection(options.out, config.model, chosen, scores)
    print(describe(config.model, chosen, scores, options.score, threshold), flush=True)
    print(f"\n{count(config.model, chosen)}: {options.out}", flush=True)
    return 0


def _parser() -> Parser:
    """With what both ways of scoring take."""
    parser = Parser("select-experts")
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--score", choices=tuple(THRESHOLDS), default="token")
    parser.add_argument("--threshold", type=float)
    return parser


def _threshold(options: argparse.Namespace) -> float:
    """The wanted or usual threshold, once both it and `--out` are found to be in order."""
    threshold = THRESHOLDS[options.score] if options.threshold is None else float(options.threshold)
    if not 0 < threshold <= 1:
        raise UserError(f"`--threshold` must lie above 0 and at most at 1, but is {threshold:g}: use 0.2")
    check_out(options.out)
    return threshold


def _prepare(plan: Plan) -> None:
    prepare(plan.config.data, plan.config.model.vocab_size, print)


def _select(plan: Plan, folder: Path) -> int:
    from launch.scores import select

    return select(plan)
