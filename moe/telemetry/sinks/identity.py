"""Which run of a service is this one, also after a resume: a name kept in the run's folder. No torch."""

from pathlib import Path

from moe.telemetry.rows import replace_file


def known_id(run: Path, service: str) -> str | None:
    """The id under which a service knows the run; None before its first time."""
    path = _path(run, service)
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def keep_id(run: Path, service: str, run_id: str) -> str:
    """Note the id for the next resume, and return it."""
    replace_file(_path(run, service), f"{run_id}\n".encode())
    return run_id


def _path(run: Path, service: str) -> Path:
    return run / f"{service}_id.txt"
