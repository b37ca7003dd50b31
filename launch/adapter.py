"""`switchyard convert to-peft`: the adapters of a LoRA run as a folder that PEFT and servers read."""

import logging
from collections.abc import Sequence
from pathlib import Path

from launch import compose
from launch.options import Parser
from launch.train import CONFIG
from moe.hf.adapter import save_adapter
from moe.hf.places import CHECKPOINTS
from parallel.checkpoint import open_latest
from parallel.errors import UserError

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Write the adapters of a run's newest checkpoint, and return the exit code."""
    parser = Parser("convert to-peft")
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base")
    options = parser.parse_args(arguments)
    if not (options.run / CONFIG).is_file():
        raise UserError(
            f"`{options.run}` must be the folder of a run, but holds no {CONFIG}: name one, as in runs/tiny"
        )
    config = compose.read_yaml(options.run / CONFIG)
    if config.tune.method != "lora":
        raise UserError(
            f"`tune.method` of `{options.run}` must be lora, but is {config.tune.method}: convert the whole "
            "model with `switchyard convert to-hf`"
        )
    saved = open_latest(options.run / CHECKPOINTS, logger.warning)
    if saved is None:
        raise UserError(f"`{options.run}` must hold a checkpoint, but has none: train it until it saves one")
    save_adapter(
        options.folder, config.model, config.tune, lambda name: saved.read(f"model/{name}"), options.base
    )
    print(f"adapters of step {saved.state['step']} are in {options.folder}")
    if lost := [name for name in ("dense", "shared") if name in config.tune.lora_targets]:
        print(
            f"note: PEFT 0.21 with transformers 5 leaves the adapters of {' and '.join(lost)} out: "
            "there, load the merged model instead"
        )
    return 0
