"""What every benchmark's command line shares: numbers, words, `--json FILE`, and the sentences about them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.options import Parser
from launch.output import check_json
from parallel.errors import UserError


def parse(
    name: str, arguments: Sequence[str], choices: Mapping[str, Sequence[str]] | None = None, **defaults: int
) -> argparse.Namespace:
    """Options of `switchyard bench NAME`: words to choose from, integers by name and default, and `--json`.

    The first word is the default. Integers are positive; one whose default is 0 may be 0.
    """
    parser = Parser(f"bench {name}")
    for option, words in (choices or {}).items():
        parser.add_argument(f"--{option}", choices=words, default=words[0])
    for option, default in defaults.items():
        parser.add_argument(f"--{_spelt(option)}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    for option, default in defaults.items():
        least, given = min(1, default), getattr(options, option)
        if given < least:
            raise UserError(f"`--{_spelt(option)}` must be at least {least}, but is {given}: use {default}")
    check_json(options.json)
    return options


def _spelt(option: str) -> str:
    """As it is typed."""
    return option.replace("_", "-")
