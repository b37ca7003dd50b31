"""Where weights may lie: a Hugging Face folder, a run, a checkpoint, a converted folder. No torch.

A converted folder is laid out like a run: `config.yaml` with the groups `model` and `balance`,
`checkpoints/step-0`, and in `hf/` what else the released folder held (tokenizer, chat template, ...). In
`hf/` of a run lies what it is trained with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moe.config import BalanceConfig, ModelConfig, TuneConfig
from moe.hf import folder as hf
from moe.rules import build
from parallel.errors import UserError

SETTINGS, CHECKPOINTS, COMPANIONS, INIT = "config.yaml", "checkpoints", "hf", "init.json"
_CHECKPOINT_INDEX = "index.json"


@dataclass(frozen=True)
class Place:
    """A Hugging Face `folder`, or the folder of a run or converted model, maybe one `checkpoint` of it."""

    folder: Path
    is_hf: bool
    checkpoint: Path | None = None

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        path = self.folder / SETTINGS
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return {name: dict(values[name]) for name in values}
        except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
            raise UserError(
                f"`{path}` must hold the settings of its run, but cannot be read ({type(error).__name__}): "
                "restore the file"
            ) from None

    @property
    def is_run(self) -> bool:
        """Whether training made it, with settings of its own."""
        return not self.is_hf and "data" in self._settings

    def settings(self) -> tuple[ModelConfig, BalanceConfig, list[str]]:
        """Model, balance, and a sentence for everything that is lost in reading them."""
        if self.is_hf:
            return hf.read_settings(self.folder)
        values = self._settings
        if "model" not in values or "balance" not in values:
            raise UserError(f"`{self.folder / SETTINGS}` must hold `model` and `balance`: restore the file")
        model = build(ModelConfig, values["model"], "model.")
        return model, build(BalanceConfig, values["balance"], "balance."), []

    def init(self) -> "Init | None":
        """What a run began from, where that is no fresh model."""
        path = None if self.is_hf else self._settings.get("train", {}).get("init")
        return None if path is None else Init(Path(path), noted_origin(self.folder))

    def lora_scale(self) -> float:
        """By how much the adapters of a run count."""
        return build(TuneConfig, self._settings.get("tune", {}), "tune.").lora_scale

    def companions(self) -> list[Path]:
        """The small files that go with the weights: tokenizer, chat template, ..."""
        folder = self.folder if self.is_hf else self.folder / COMPANIONS
        return list(hf.companions(folder)) if folder.is_dir() else []


@dataclass(frozen=True)
class Init:
    """What a run began from, and the checksum that it had then (None: never noted)."""

    path: Path
    origin: str | None


def noted_origin(run: Path) -> str | None:
    """The checksum of what a run began from, as the run noted it."""
    try:
        return str(json.loads((run / INIT).read_text())["origin"])
    except FileNotFoundError:
        return None


def find(path: Path) -> Place:
    """What lies at a path; UserError where it is none of the kinds."""
    if (path / hf.CONFIG).is_file():
        return Place(path, True)
    if (path / SETTINGS).is_file():
        return Place(path, False)
    if (path / _CHECKPOINT_INDEX).is_file():
        return Place(path.resolve().parent.parent, False, path)
    raise UserError(
        "weights must come from a Hugging Face folder, a converted folder, a run or a checkpoint, but "
        f"`{path}` has neither {hf.CONFIG}, {SETTINGS} nor {_CHECKPOINT_INDEX}: give the path of one"
    )
