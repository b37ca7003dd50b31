"""`switchyard schedule`: prints, prices and draws a pipeline schedule, or all side by side. No torch.

The costs of one schedule are those of one of its stages. Where schedules are compared, all do the same
work: the costs are those of a rank's share of the model, which some of them cut into several stages.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.options import Parser
from launch.output import check_json, write_json
from moe.telemetry.rows import replace_file
from parallel.errors import UserError
from parallel.pipeline.action import Schedule
from parallel.pipeline.draw import draw
from parallel.pipeline.schedules import FORMS, make, make_all
from parallel.pipeline.simulate import Costs, parse_costs, simulate
from parallel.pipeline.summary import stage_costs, summarize
from parallel.pipeline.text import sketch
from parallel.pipeline.timeline import Timeline
from parallel.pipeline.trace import trace

FOLDER = Path("schedules")
STDOUT = Path("-")


@dataclass(frozen=True)
class Replay:
    """A schedule as it was called for, the costs of one of its stages, and its simulation."""

    name: str
    costs: Costs
    timeline: Timeline

    def json(self) -> dict[str, Any]:
        """For machines, as the contract of the command says."""
        schedule = self.timeline.schedule
        return {
            "name": self.name,
            "ranks": schedule.num_ranks,
            "microbatches": schedule.num_microbatches,
            "stages": schedule.num_stages,
            "costs": asdict(self.costs),
            **asdict(summarize(self.timeline)),
            "actions": [schedule.words(rank) for rank in range(schedule.num_ranks)],
        }

    def __str__(self) -> str:
        summary = summarize(self.timeline)
        peaks = " ".join(map(str, summary.peak_activations))
        return (
            f"{self.timeline.schedule}\n\n{sketch(self.timeline)}\n\n{self.name}: {summary}\n"
            f"peak activations rank by rank, in microbatches on a stage: {peaks}"
        )


def main(arguments: Sequence[str]) -> int:
    """Show one schedule or compare all; write JSON, pictures and a trace where they are wanted."""
    options = _parse(arguments)
    if options.compare:
        replays, left_out = _replay_all(options)
        text, result = _comparison(replays, left_out, options)
    else:
        replays = [_replay_one(options)]
        text, result = str(replays[0]), replays[0].json()
    print(json.dumps(result, indent=2) if options.json == STDOUT else text, flush=True)
    if options.json != STDOUT:
        write_json(options.json, result)
    if options.out:
        name = "compare" if options.compare else options.name
        said = _write(replays, options.out / f"{name}-{options.ranks}-{options.microbatches}")
        if options.json != STDOUT:
            print(f"\n{said}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("schedule")
    parser.add_argument("name", nargs="?")
    for name in ("--ranks", "--microbatches"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--stages-per-rank", type=int)
    parser.add_argument("--cost")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--json", type=Path, nargs="?", const=STDOUT)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    for name in ("ranks", "microbatches"):
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"`--{name}` must be at least 1, but is {value}: use 1 or more")
    if options.name is None and not options.compare:
        raise UserError(f"a schedule must be named, but none is: use {', '.join(FORMS)}, or `--compare`")
    if options.stages_per_rank is None:
        options.stages_per_rank = 2
    elif not options.compare and options.name != "interleaved":
        raise UserError(
            f"`--stages-per-rank` is for `interleaved`, but the schedule is `{options.name}`: leave it out"
        )
    check_json(options.json)
    options.cost = Costs() if options.cost is None else parse_costs(options.cost)
    if options.out is None and options.json != STDOUT:  # a machine that reads the output wants no files
        options.out = FOLDER
    return options


def _replay(name: str, schedule: Schedule, costs: Costs) -> Replay:
    return Replay(name, costs, simulate(schedule, costs.price(schedule), costs.p2p))


def _replay_one(options: argparse.Namespace) -> Replay:
    schedule = make(
        options.name, options.ranks, options.microbatches, stages_per_rank=options.stages_per_rank
    )
    return _replay(options.name, schedule, options.cost)


def _replay_all(options: argparse.Namespace) -> tuple[list[Replay], dict[str, str]]:
    """All schedules that can run with these numbers, and by name why the others cannot."""
    if options.name is not None:
        _replay_one(options)  # the one that was called for must be among them
    made, left_out = make_all(options.ranks, options.microbatches, stages_per_rank=options.stages_per_rank)
    return [_replay(name, each, stage_costs(options.cost, each)) for name, each in made.items()], left_out


def _comparison(
    replays: Sequence[Replay], left_out: Mapping[str, str], options: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """As text and for machines."""
    result = {
        "ranks": options.ranks,
        "microbatches": options.microbatches,
        "costs": asdict(options.cost),
        "rows": [replay.json() for replay in replays],
        "left_out": left_out,
    }
    return "\n".join([*_table(replays), *(f"left out: {reason}" for reason in left_out.values())]), result


def _table(replays: Sequence[Replay]) -> list[str]:
    rows = [("schedule", "makespan", "bubble", "exposed communication", "peak activations", "weights")]
    for replay in replays:
        numbers = summarize(replay.timeline)
        bubble, exposed = numbers.part(numbers.bubble), numbers.part(numbers.exposed)
        peak, weights = f"{numbers.peak_share:g}", f"{numbers.weights_held:g}"
        rows.append((replay.name, f"{numbers.makespan:.4g}", bubble, exposed, peak, weights))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                f"{name:<{widths[0]}}",
                *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)),
            ]
        )
        for name, *cells in rows
    ]
    share = f"1/{replays[0].timeline.schedule.num_ranks} of the model"
    return [*lines, f"peak activations: microbatches on {share}; weights: times {share}"]


def _write(replays: Sequence[Replay], path: Path) -> str:
    """Pictures and a trace, named like `path` with a suffix each; says where they are."""
    timelines, names = [replay.timeline for replay in replays], [replay.name for replay in replays]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".svg"):
            draw(timelines, names, path.with_name(path.name + suffix))
        content = json.dumps(trace(timelines, names)).encode()
        replace_file(path.with_name(f"{path.name}.trace.json"), content)
    except OSError as error:
        raise UserError(
            f"`--out` must be a folder to write into, but {path.parent} is none ({error.strerror}): "
            "choose another"
        ) from error
    return f"drawn: {path}.png, .svg, and .trace.json for ui.perfetto.dev"
