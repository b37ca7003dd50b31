"""The options of a command, beside the settings that Hydra reads. No torch."""

import argparse
from typing import NoReturn

from parallel.errors import UserError


class Parser(argparse.ArgumentParser):
    """Whatever is wrong with options is one sentence; `--help` is answered before any of this."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"switchyard {command}", allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message}: `{self.prog} --help` says how it is used")
