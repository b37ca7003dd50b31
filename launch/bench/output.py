"""What every benchmark's command line shares: `--steps`, `--json FILE`, and the sentences about them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.telemetry.sinks import replace_file
from parallel.errors import UserError


def parse(name: str, arguments: Sequence[str], **defaults: int) -> argparse.Namespace:
    """Options of `switchyard bench NAME`: positive integers by name and default, and `--json`."""
    parser = argparse.ArgumentParser(prog=f"switchyard bench {name}")
    for option, default in defaults.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    for option, default in defaults.items():
        if getattr(options, option) < 1:
            raise UserError(
                f"`--{option}` must be at least 1, but is {getattr(options, option)}: use {default}"
            )
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(
            f"`--json` must lie in an existing folder, but {options.json} does not: make it first"
        )
    return options


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the result where `--json` says, if it was given."""
    if options.json:
        replace_file(options.json, json.dumps(result, indent=2).encode())
