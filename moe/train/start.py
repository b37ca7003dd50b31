"""Where the weights of a run begin: `train.init`, as far as no checkpoint of the run itself brings them.

A run notes in `init.json` what it began from. A resumed run takes what its checkpoint holds; only what
was never trained is read from `train.init` again, which must then still be the same.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from moe.config import TrainConfig
from moe.hf.inventory import in_checkpoint, model_pieces
from moe.hf.load import fill
from moe.hf.places import INIT, Init, noted_origin
from moe.hf.tensors import Weights
from moe.hf.weights import open_init
from moe.model.init import init_weights
from moe.model.transformer import Transformer
from parallel.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What training begins with. `saved` are the tensors of the checkpoint that is read afterwards."""

    init: Init
    saved: Collection[str] = ()

    def fill(self, model: Transformer, seed: int) -> None:
        """Fill this rank's part of a model; MTP modules that the source lacks are drawn from the seed."""
        held = [in_checkpoint(piece.name) for piece in model_pieces(model)]
        if all(name in self.saved for name in held):
            return
        lacking = fill(model, self.open(), self.init.path)
        if lacking:
            logger.warning(
                "%s has no MTP module %s: its weights are drawn from `train.seed`",
                self.init.path,
                ", ".join(sorted({name.split(".")[1] for name in lacking})),
            )
            init_weights(model, model.config.init_std, seed, only=lacking)

    def open(self) -> Weights:
        """The weights; UserError where they are gone or no longer what the run began from."""
        return open_init(self.init)


def new(config: TrainConfig) -> Start | None:
    """The start of a new run; None where it begins with fresh weights."""
    return Start(Init(Path(config.init), None)) if config.init else None


def resumed(run: Path, config: TrainConfig, saved: Collection[str]) -> Start | None:
    """The start of a run that has a checkpoint with these tensors."""
    return Start(Init(Path(config.init), noted_origin(run)), saved) if config.init else None


def note(run: Path, start: Start) -> None:
    """Write down, as a new run begins, what it begins from."""
    write_json(run / INIT, {"origin": start.open().origin})
