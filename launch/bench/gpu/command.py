"""`switchyard bench gpu`: is this card's every path right, and how fast is it? Without any set-up.

One process, no network, no data. Parts run in order of importance; one that fails leaves the others, and what
the machine lacks is named.
"""

import argparse
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from launch.bench.gpu.card import card_name, versions
from launch.bench.gpu.markdown import markdown
from launch.bench.gpu.parts import Bench, Part, run_parts
from launch.bench.gpu.timer import Timer
from launch.options import Parser
from launch.output import check_json, write_json
from moe.telemetry.rows import replace_file
from parallel.errors import UserError

_PACKAGE = "launch.bench.gpu"
CORRECTNESS = "correctness"
PARTS = (
    Part(name="environment", does="The card and versions", target=f"{_PACKAGE}.card:rows", share=0.1),
    Part(
        name="ceilings",
        does="The most that products and copies give",
        target=f"{_PACKAGE}.ceilings:rows",
        share=0.2,
    ),
    Part(
        name=CORRECTNESS,
        does="Every path against fp64 on the host",
        target=f"{_PACKAGE}.checks:rows",
        share=0.3,
    ),
    Part(
        name="layer",
        does="Forward and backward of a layer of experts",
        target=f"{_PACKAGE}.layers:rows",
        share=0.3,
    ),
    Part(
        name="model",
        does="Training steps of four layers of V2-Lite",
        target=f"{_PACKAGE}.models:rows",
        share=0.3,
    ),
    Part(
        name="overlap",
        does="All-to-all behind compute, with an emulated peer",
        target=f"{_PACKAGE}.streams:rows",
        share=0.2,
    ),
    Part(name="fp8", does="FP8 products beside bf16", target=f"{_PACKAGE}.eighths:rows", share=0.2),
)


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables, and write what was asked for. 1: a check did not hold."""
    options = _parse(arguments)
    if options.show:
        print(markdown(json.loads(options.show.read_text())))
        return 0
    if not torch.cuda.is_available():
        raise UserError(
            "`bench gpu` needs an NVIDIA GPU, but torch sees none: run it on a machine that has one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    result = measure(PARTS, Bench(device, Timer(device)), 60 * options.minutes)
    print(f"\n{markdown(result)}")
    write_json(options.json, result)
    if options.out:
        write_page(options.out, result)
    return exit_code(result)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("bench gpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    for name in ("json", "out", "show"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        raise UserError(f"`--minutes` must be above 0, but is {options.minutes}: use 8")
    check_json(options.json)
    if options.out and not options.out.is_dir():
        raise UserError(f"`--out` must be a folder that is there, but {options.out} is not: make it first")
    if options.show and not options.show.is_file():
        raise UserError(f"`--show` must be a file that `--json` wrote, but {options.show} is none: name one")
    return options


def measure(parts: Sequence[Part], bench: Bench, budget: float) -> dict[str, Any]:
    """Run the parts for about `budget` seconds: device, versions, date, and what each part gave."""
    return {
        "device": card_name(bench.device),
        "versions": versions(),
        "date": date.today().isoformat(),
        "parts": run_parts(parts, bench, budget, lambda line: print(line, flush=True)),
    }


def exit_code(result: dict[str, Any]) -> int:
    """1 where a check did not hold, or where not all could be made."""
    held = all(row["ok"] is not False for part in result["parts"] for row in part["rows"])
    made = all(part["problem"] is None for part in result["parts"] if part["name"] == CORRECTNESS)
    return 0 if held and made else 1


def write_page(folder: Path, result: dict[str, Any]) -> Path:
    """Write `CARD-DATE.md` and the JSON beside it."""
    card = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    page = folder / f"{card}-{result['date']}.md"
    replace_file(page, markdown(result).encode())
    write_json(page.with_suffix(".json"), result)
    return page
