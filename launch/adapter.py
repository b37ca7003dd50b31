"""`switchyard convert to-peft` and `to-esft`: what a run trained, without what it trained it from.

The adapters of a LoRA run as a folder that PEFT and servers read; the changed experts of an ESFT run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from launch.options import Parser
from launch.train import read_settings
from moe.config import RunConfig
from moe.hf.adapter import save_adapter
from moe.hf.esft import save_changed
from moe.hf.places import find
from moe.hf.weights import open_saved
from moe.train.tuning import selection_of
from parallel.checkpoint import Checkpoint
from parallel.errors import UserError


def to_peft(arguments: Sequence[str]) -> int:
    """Write the adapters of a LoRA run, and return the exit code."""
    parser = _parser("to-peft")
    parser.add_argument("--base")
    options = parser.parse_args(arguments)
    config, saved = _open(options.run, "lora")
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


def to_esft(arguments: Sequence[str]) -> int:
    """Write the trained tensors of an ESFT run, and return the exit code."""
    options = _parser("to-esft").parse_args(arguments)
    config, saved = _open(options.run, "esft")
    selection = selection_of(config)
    assert selection is not None, "the method is esft"
    held = sorted(name for name in saved.names if name.startswith("model/"))
    tensors = ((name.removeprefix("model/"), saved.read(name)) for name in held)
    save_changed(options.folder, config.model, selection, tensors)
    print(f"{options.folder}: what {options.run} changed up to step {saved.state['step']}")
    return 0


def _parser(command: str) -> Parser:
    parser = Parser(f"convert {command}")
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    return parser


def _open(path: Path, method: Literal["lora", "esft"]) -> tuple[RunConfig, Checkpoint]:
    """The settings and the newest good checkpoint of a run, or the checkpoint that is named."""
    place = find(path)
    if place.is_hf:
        raise UserError(f"`{path}` must be a run or a checkpoint, but is a Hugging Face folder: name a run")
    config = read_settings(place.folder)
    if config.tune.method != method:
        raise UserError(
            f"`tune.method` of `{path}` must be {method}, but is {config.tune.method}: convert the whole "
            "model with `switchyard convert to-hf`"
        )
    return config, open_saved(place, verify=True)
