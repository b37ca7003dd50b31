"""What every benchmark's command line shares: `--steps`, `--json FILE`, and the sentences about them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.options import Parser
from launch.output import check_json
from parallel.errors import UserError


def parse(name: str, arguments: Sequence[str], **defaults: int) -> argparse.Namespace:
    """Options of `switchyard bench NAME`: integers by name and default, and `--json`.

    They are positive; one whose default is 0 may be 0.
    """
    parser = Parser(f"bench {name}")
    for option, default in defaults.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    for option, default in defaults.items():
        least, given = min(1, default), getattr(options, option)
        if given < least:
            raise UserError(f"`--{option}` must be at least {least}, but is {given}: use {default}")
    check_json(options.json)
    return options
