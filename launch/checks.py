"""`switchyard test`: the same checks by hand and in CI: lint, format, types, tests."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["pytest", "-q", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
STEPS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], PYTEST)


def main(arguments: Sequence[str]) -> int:
    """Run every step and return 1 if any failed; with arguments, only pytest with these."""
    if not (ROOT / "tests").is_dir():
        raise UserError(
            "`switchyard test` needs the source tree, but this is an installed package: use a clone"
        )
    steps = [["pytest", *arguments]] if arguments else STEPS
    failed = [step for step in steps if not _passes(step)]
    for step in failed:
        print(f"failed: {' '.join(step)}", flush=True)
    return 1 if failed else 0


def _passes(step: Sequence[str]) -> bool:
    print(f"\n> {' '.join(step)}", flush=True)
    return subprocess.run([sys.executable, "-m", *step], cwd=ROOT).returncode == 0
