"""Filling a model with weights from wherever they lie: each rank reads only what it holds.

Files are memory-mapped and values are copied straight to their place, so that no more than one tensor
is held beside the model. All names and shapes are checked before the first is read.
"""

import logging
from pathlib import Path

import torch

from moe.hf.inventory import complete, is_bias, model_pieces
from moe.hf.places import find
from moe.hf.tensors import Weights
from moe.hf.weights import open_weights
from moe.model.transformer import Transformer
from parallel.collectives import ALONE, ModelGroups
from parallel.errors import UserError

logger = logging.getLogger(__name__)


def open_model(
    folder: Path, *, groups: ModelGroups = ALONE, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of a Hugging Face folder, converted folder, run or checkpoint; what is lost is logged.

    MTP modules that a `config.json` counts but the files lack (transformers saves none) are left out.
    """
    for sentence in find(folder).settings()[2]:
        logger.warning("%s: %s", folder, sentence)
    opened = open_weights(folder)
    model = Transformer(opened.config, opened.balance, groups, dtype, seed=None)
    fill(model, opened.weights, folder)
    return model


def load(model: Transformer, folder: Path) -> None:
    """Fill a model with the weights of a folder, checkpoint or run, which must hold all of it."""
    if lacking := fill(model, open_weights(folder).weights, folder):
        raise UserError(f"`{folder}` must hold `{lacking[0]}`, but does not: use fewer MTP modules")


@torch.no_grad()
def fill(model: Transformer, weights: Weights, source: Path) -> list[str]:
    """Fill what this rank holds of a model; the names of MTP modules' tensors that the source lacks,
    the same on every rank.

    Those are left as they are. Values are cast to the model's dtypes; biases stay fp32. UserError,
    naming tensor and `source`, for anything else that is missing, unexpected or of another shape.
    """
    known, found = complete(model.config), weights.names
    pieces = [piece for piece in model_pieces(model) if piece.name in known or is_bias(piece.name)]
    lacking = [name for name in known if name not in found]
    for name in lacking:
        if not name.startswith("mtp."):
            raise _unlike(source, f"hold `{name}`, but does not")
    for name in found:
        is_extra = name not in known and not is_bias(name)
        if is_extra and not (name.startswith("mtp.") and _mtp_module(name) >= model.config.num_mtp_layers):
            raise _unlike(source, f"hold only tensors of the configured model, but has `{name}`")
    for piece in pieces:
        if piece.name in found and weights.shape(piece.name) != tuple(piece.shape):
            shape = weights.shape(piece.name)
            raise _unlike(source, f"hold `{piece.name}` in shape {tuple(piece.shape)}, but has it in {shape}")
    for piece in pieces:
        if piece.name in found:
            weights.read_into(piece)
        elif is_bias(piece.name):  # a V2 file has none: it is 0 there
            piece.tensor.zero_()
    _check_biases(model, source)
    return lacking


def _mtp_module(name: str) -> int:
    return int(name.split(".")[1])


def _unlike(source: Path, what: str) -> UserError:
    return UserError(f"`{source}` must {what}: use the configuration that the weights were trained with")


def _check_biases(model: Transformer, source: Path) -> None:
    for layer, router in model.routers():
        if router.balance.bias == "none" and router.bias.any():
            raise UserError(
                f"`balance.bias` must be update or frozen for `{source}`, since layer {layer} has a bias, "
                "but is none: set `balance.bias=frozen`"
            )
