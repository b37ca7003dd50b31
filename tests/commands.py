"""Commands as a user types them, in a fresh process that need not import torch again.

`run_command(words, folder)` is `python -m launch words` in a folder, forked from the server that the ranks of
tests/ranks.py come from: of our modules it has none, of other people's those that take long. The ranks that a
command starts are processes like any.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.ranks import CONTEXT

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 300


def run_command(words: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """What `subprocess.run` with captured text returns; TimeoutExpired when it takes too long."""
    with tempfile.TemporaryDirectory(prefix="command-") as place:
        out, err = Path(place) / "out", Path(place) / "err"
        for path in (out, err):
            path.touch()
        process = CONTEXT.Process(target=_run, args=(list(words), folder, out, err))
        process.start()
        process.join(PATIENCE_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(words), PATIENCE_SECONDS)
        return subprocess.CompletedProcess(list(words), process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], folder: Path, out: Path, err: Path) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for path, number in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["launch", *words]
    runpy.run_module("launch", run_name="__main__")
