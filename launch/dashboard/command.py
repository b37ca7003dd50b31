"""`switchyard dashboard`: runs live in a browser, as one file, or in the terminal. No torch."""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.dashboard.export import check_export, write_export
from launch.dashboard.server import Server
from launch.dashboard.text import Look, draw
from launch.dashboard.view import METRICS, SETTINGS, RunView
from launch.options import Parser
from parallel.errors import UserError

RUNS = Path("runs")
HOST, PORT = "127.0.0.1", 8765


def main(arguments: Sequence[str]) -> int:
    """Show runs until Ctrl-C; with `--export` or `--text`, write or print them and return 0."""
    options = _parse(arguments)
    check_export(options.export)
    views = open_runs(options.runs)
    if options.text:
        look = Look.of(sys.stdout)
        print("\n\n".join(draw(run, look, layer=options.layer, step=options.step) for run in views))
    if options.export:
        write_export(options.export, [run.view() for run in views])
        print(f"{options.export}: {options.export.stat().st_size / 1e6:.1f} MB, opens offline")
    if not (options.text or options.export):
        _serve(views, options.host, options.port)
    return 0


def open_runs(words: Sequence[str]) -> list[RunView]:
    """Each word's run once: a folder, or a name under runs/; those of equal names are told apart by path."""
    folders = list({folder.resolve(): folder for folder in map(_folder, words)}.values())
    names = [folder.resolve().name for folder in folders]
    return [
        RunView(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _folder(word: str) -> Path:
    tried = [Path(word).expanduser(), RUNS / word]
    for folder in tried:
        if any((folder / name).is_file() for name in (METRICS, SETTINGS)):
            return folder
    if any(folder.is_dir() for folder in tried):
        raise UserError(f"RUN must be a run's folder, but {word} holds no {METRICS}: name another")
    raise UserError(f"RUN must be a run's folder or a name under {RUNS}/, but there is no {word}: {_known()}")


def _known() -> str:
    found = sorted(path.parent.name for path in RUNS.glob(f"*/{METRICS}"))
    return f"use {', '.join(found)}" if found else "`switchyard train` makes one"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("dashboard")
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--export", type=Path)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--layer")
    parser.add_argument("--step", type=int)
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_intermixed_args(arguments)
    if not options.runs:
        raise UserError(f"a run must be named, but none is: {_known()}")
    if not 0 <= options.port <= 65535:
        raise UserError(f"`--port` must be 0 to 65535, but is {options.port}: 0 takes any free one")
    for name in ("layer", "step"):
        if getattr(options, name) is not None and not options.text:
            raise UserError(
                f"`--{name}` is for `--text`, which is not given: add it, or leave `--{name}` out"
            )
    return options


def _serve(views: Sequence[RunView], host: str, port: int) -> None:
    with Server(views, host, port) as server:
        print(f"dashboard of {', '.join(run.name for run in views)}: {server.url}")
        if server.is_local:
            machine = socket.gethostname()
            print(f"from another machine: ssh -C -L {server.port}:127.0.0.1:{server.port} {machine}")
        else:
            print("note: whoever reaches this machine can see these runs")
        print("Ctrl-C ends it", flush=True)
        server.serve_forever(poll_interval=0.2)
