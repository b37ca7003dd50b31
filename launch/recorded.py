"""What a run recorded of its experts' load, for the commands that decide something by it. No torch."""

from pathlib import Path

from launch.train import read_settings
from moe.config import RunConfig
from moe.hf.places import SETTINGS
from moe.telemetry.frames import join
from moe.telemetry.history import History, read_history, read_parts
from parallel.errors import UserError


def read_recorded(run: Path, most: int | None = None) -> tuple[RunConfig, History]:
    """A run's settings and its load, in at most so many frames; UserError where it recorded none."""
    return _settings(run), _some(run, read_history(run, most))


def read_single_steps(run: Path, last: int | None = None) -> tuple[RunConfig, History]:
    """A run's settings and its last so many steps (None: all), as far as they are recorded one by one.

    UserError where it recorded none.
    """
    config = _settings(run)
    history = _some(run, join([part for part in read_parts(run) if (part.spans == 1).any()]))
    summed = history.steps[history.spans > 1]
    since = [int(summed[-1])] if len(summed) else [0]
    if last is not None:
        since.append(history.last - last)
    return config, history.after(max(since))


def _settings(run: Path) -> RunConfig:
    if not (run / SETTINGS).is_file():
        raise UserError(
            f"measured load must come from a run's folder, but {run} is no such folder: give its path, as in "
            "runs/tiny"
        )
    return read_settings(run)


def _some(run: Path, history: History) -> History:
    if not len(history):
        raise UserError(
            f"measured load must come from a run that trained layers of experts, but {run} recorded no step: "
            "give the folder of another"
        )
    return history
