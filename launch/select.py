"""`switchyard select-experts`: score a model's experts on data, and write which of them to train.

Here it is decided what is scored, and the ranks of the layout are started unless they are there already.
Each reads the plan from a folder; the first one writes what all found.
"""

import argparse
import json
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from launch import compose
from launch.ranks import AS_RANK, PARTING, Meeting, Ranks, rank_command, started_ranks
from launch.train import CONFIG
from moe.config import RunConfig
from moe.data.corpus import prepare
from moe.rules import build, validate
from parallel.checkpoint import open_latest
from parallel.errors import UserError

logger = logging.getLogger(__name__)

PLAN = "plan.json"
THRESHOLDS = {"token": 0.2, "gate": 0.1}  # of the paper


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is scored, how, and where the result goes."""

    config: RunConfig
    checkpoint: str  # its folder
    score: Literal["token", "gate"]
    threshold: float
    sequences: int
    out: str


def main(arguments: Sequence[str]) -> int:
    """Score and write; the exit code: 0 done, 2 the user's input, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments[:1] == [AS_RANK]:
        return _be_rank(Path(arguments[1]), Meeting())
    ranks = started_ranks()
    return _join_ranks(arguments, ranks) if ranks else _start_here(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `switchyard select-experts --help` says how it is used")


def make_plan(arguments: Sequence[str]) -> Plan:
    """Compose and check the settings. Text is cut into tokens as the run's own was."""
    parser = _Parser(prog="switchyard select-experts", allow_abbrev=False, add_help=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--score", choices=tuple(THRESHOLDS), default="token")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--sequences", type=int, default=32)
    options, rest = parser.parse_known_args(arguments)
    threshold = THRESHOLDS[options.score] if options.threshold is None else options.threshold
    if not 0 < threshold <= 1:
        raise UserError(f"`--threshold` must lie above 0 and at most at 1, but is {threshold:g}: use 0.2")
    if options.sequences < 1:
        raise UserError(f"`--sequences` must be at least 1, but is {options.sequences}: use 32")
    if not options.out.resolve().parent.is_dir():
        raise UserError(f"`--out` must lie in an existing folder, but {options.out} does not: make it first")
    config, folder = _settings(rest)
    weights = open_latest(folder / "checkpoints", logger.warning)
    if weights is None:
        raise UserError(f"{folder} must hold a checkpoint to score, but has none: train it first")
    return Plan(
        config=config,
        checkpoint=str(weights.folder),
        score=options.score,
        threshold=threshold,
        sequences=options.sequences,
        out=str(options.out),
    )


def _settings(arguments: Sequence[str]) -> tuple[RunConfig, Path]:
    """The settings of a run under overrides, and its folder."""
    named, overrides = compose.take(arguments, ("run",))
    if "run" not in named:
        raise UserError("`run=` must name the run whose experts are scored, but is not given: add `run=NAME`")
    folder = Path(RunConfig().launch.runs) / named["run"]
    saved, config = compose.read_yaml(folder / CONFIG), compose.from_saved(folder / CONFIG, overrides)
    if config.data != saved.data and config.data.tokenizer is None:  # it would be trained on the other text
        tokenizer = prepare(saved.data, saved.model.vocab_size).tokenizer_path
        config = replace(config, data=replace(config.data, tokenizer=str(tokenizer)))
    return config, folder


def _start_here(arguments: Sequence[str]) -> int:
    plan = make_plan(arguments)
    layout = validate(plan.config)
    prepare(plan.config.data, plan.config.model.vocab_size, print)
    from launch.local import start_ranks  # imports torch

    with _folder(plan, None) as folder:
        command = rank_command("select-experts", folder)
        return start_ranks(layout.world_size, command, plan.config.launch.threads)


def _join_ranks(arguments: Sequence[str], ranks: Ranks) -> int:
    meeting = Meeting()
    if ranks.rank > 0:
        decision = meeting.listen()
        return 2 if "error" in decision else _be_rank(Path(decision["folder"]), meeting)
    try:
        plan = make_plan(arguments)
        prepare(plan.config.data, plan.config.model.vocab_size, print)
    except UserError as error:
        meeting.announce({"error": str(error)})
        raise
    with _folder(plan, Path(plan.config.data.cache).expanduser()) as folder:
        meeting.announce({"folder": str(folder)})
        return _be_rank(folder, meeting)


@contextmanager
def _folder(plan: Plan, parent: Path | None) -> Iterator[Path]:
    """A temporary folder that holds the plan."""
    with tempfile.TemporaryDirectory(prefix=".selecting-", dir=parent) as name:
        folder = Path(name).resolve()
        (folder / PLAN).write_text(json.dumps(asdict(plan)))
        yield folder


def _be_rank(folder: Path, meeting: Meeting) -> int:
    from torch import set_num_threads

    from launch.scores import select

    plan = build(Plan, json.loads((folder / PLAN).read_text()))
    if plan.config.launch.threads is not None:  # torchrun and srun know nothing of this setting
        set_num_threads(plan.config.launch.threads)
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is to be saved
        signal.signal(number, signal.SIG_DFL)
    try:
        select(plan)
    except UserError as error:
        if meeting.is_first(str(error)):
            print(f"switchyard: {error}", file=sys.stderr)
        meeting.part(PARTING)
        return 2
    return 0
