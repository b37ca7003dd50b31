"""The command line: `switchyard COMMAND`, `python -m launch COMMAND`.

A command is a row of the table in commands.py; its module is imported when it is called, so that `--help`
costs nothing. Whatever a user can mend arrives as a `UserError`, or as `BadRow` of a run's file, and leaves
as one sentence and exit code 2; everything else is a defect of ours and keeps its traceback.
"""

import difflib
import logging
import os
import sys
from collections.abc import Sequence

from launch.commands import COMMANDS, Command
from moe.telemetry.rows import BadRow
from parallel.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see the contract: 0, 1, 2 or 130)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_logging()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except (UserError, BadRow) as error:
        print(f"switchyard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; the interpreter would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _set_up_logging() -> None:
    """Warnings as plain lines on stderr, from the first rank only: the others would repeat them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("switchyard: %(message)s"))
    handler.addFilter(lambda record: os.environ.get("RANK", "0") == "0")
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(list(COMMANDS)))
        return 0
    for name, command in COMMANDS.items():
        length = len(name.split())
        if words[:length] == name.split():
            rest = words[length:]
            if "-h" in rest or "--help" in rest:
                print(_help(command))
                return 0
            return command.call(rest)
    members = [name for name in COMMANDS if name.split()[0] == words[0]]
    if members and words[1:] in ([], ["-h"], ["--help"]):
        print(_overview(members))
        return 0
    asked = " ".join(words[:2]) if members else words[0]
    nearest = difflib.get_close_matches(asked, members or list(COMMANDS), n=1, cutoff=0.0)[0]
    raise UserError(f"there is no command `{asked}`: did you mean `{nearest}`?")


def _overview(names: Sequence[str]) -> str:
    rows = "\n".join(f"  {name:<20}{COMMANDS[name].does}" for name in names)
    return f"usage: switchyard COMMAND [ARGUMENTS]\n\n{rows}\n\n`switchyard COMMAND --help` says more."


def _help(command: Command) -> str:
    does = command.does[0].upper() + command.does[1:]
    return f"usage: switchyard {command.usage}\n\n{does}.\n\n{command.details}\n\nexample: {command.example}"


if __name__ == "__main__":
    sys.exit(main())
