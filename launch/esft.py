"""`switchyard convert to-esft` and `merge-esft`: changed experts out of a run, and into a whole model."""

import logging
from collections.abc import Sequence
from pathlib import Path

from launch.train import read_settings
from moe.hf.esft import merge_changed, save_changed
from moe.hf.places import CHECKPOINTS
from moe.train.tuning import selection_of
from parallel.checkpoint import open_latest
from parallel.errors import UserError

logger = logging.getLogger(__name__)


def export(arguments: Sequence[str]) -> int:
    """Write the trained tensors of a run's newest checkpoint; the exit code."""
    run, folder = _paths(arguments, "RUN DIR")
    config = read_settings(run)
    selection = selection_of(config)
    if selection is None:
        raise UserError(
            f"{run} must have been trained with `tune.method=esft`, but was with {config.tune.method}: "
            "export the whole model"
        )
    saved = open_latest(run / CHECKPOINTS, logger.warning)
    if saved is None:
        raise UserError(f"{run} must hold a checkpoint to export, but has none: train it first")
    held = sorted(name for name in saved.names if name.startswith("model/"))
    tensors = ((name.removeprefix("model/"), saved.read(name)) for name in held)
    save_changed(folder, config.model, selection, tensors)
    print(f"{folder}: what {run} changed up to step {saved.state['step']}")
    return 0


def merge(arguments: Sequence[str]) -> int:
    """Put an adapter into a whole model; the exit code."""
    base, adapter, folder = _paths(arguments, "BASE ADAPTER DIR")
    print(f"{folder}: {base} with {merge_changed(base, adapter, folder)} tensors of {adapter}")
    return 0


def _paths(arguments: Sequence[str], usage: str) -> list[Path]:
    if len(arguments) != len(usage.split()) or any(word.startswith("-") for word in arguments):
        raise UserError(f"this command takes {usage}, but was given {' '.join(arguments) or 'nothing'!r}")
    return [Path(word).expanduser() for word in arguments]
