"""What a run recorded of its experts' load, for the commands that decide something by it. No torch."""

from pathlib import Path

from launch.train import read_settings
from moe.config import RunConfig
from moe.hf.places import SETTINGS
from moe.telemetry.history import History, read_history
from parallel.errors import UserError


def read_recorded(run: Path, most: int | None = None) -> tuple[RunConfig, History]:
    """A run's settings and its load, in at most so many frames; UserError where it recorded none."""
    if not (run / SETTINGS).is_file():
        raise UserError(f"measured load must come from a run, but {run} is none: give the folder of one")
    config, history = read_settings(run), read_history(run, most)
    if not len(history.steps):
        raise UserError(
            f"measured load must come from a run that trained layers of experts, but {run} recorded no step: "
            "give the folder of another"
        )
    return config, history


def single_steps(history: History, last: int | None = None) -> History:
    """The last so many steps (None: all) as far as they are still recorded one by one."""
    summed = history.steps[history.spans > 1]
    since = [int(summed[-1])] if len(summed) else [0]
    if last is not None:
        since.append(int(history.steps[-1]) - last)
    return history.after(max(since))
