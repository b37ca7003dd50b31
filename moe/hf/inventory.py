"""What tensors a model has under canonical names: its parameters, and the selection biases of its routers.

And where each of them stands elsewhere: in a checkpoint of training, and in released files.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.hf import names
from moe.model.transformer import Transformer
from parallel.rectangles import Rectangle
from parallel.shards import Piece, parameter_pieces


def is_bias(name: str) -> bool:
    """Whether a canonical name is a router's selection bias, fp32 in every file."""
    return name.endswith(".router.bias")


def is_adapter(name: str) -> bool:
    """Whether a canonical name is of a low-rank adapter (parallel/lora.py)."""
    return name.endswith(("lora.down.weight", "lora.up.weight"))


def model_pieces(model: Transformer) -> Iterator[Piece]:
    """All that a model file holds as far as it lives on this rank, as views that can be written.

    Adapters are not among it: they have a file of their own (adapter.py).
    """
    yield from (piece for piece in parameter_pieces(model) if not is_adapter(piece.name))
    for name, buffer in model.named_buffers():
        if is_bias(name):
            yield Piece(name, tuple(buffer.shape), (0,), buffer)


def model_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, writable view) of all that an uncut model's file holds; only this rank's experts."""
    for piece in model_pieces(model):
        assert piece.tensor.shape == piece.shape, f"{piece.name} is cut"
        yield piece.name, piece.tensor


def complete(config: ModelConfig) -> dict[str, torch.Size]:
    """Every canonical tensor of a released file with its shape, over all ranks. Only V3 files hold biases."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    with_bias = config.score_function == "sigmoid"
    return {name: tensor.shape for name, tensor in model_tensors(model) if with_bias or not is_bias(name)}


def in_checkpoint(name: str) -> str:
    """What a checkpoint of training calls a canonical tensor: `model/NAME`, or `router/LAYER.bias`."""
    if not is_bias(name):
        return f"model/{name}"
    kind, number = name.split(".")[:2]
    return f"router/{number if kind == 'layers' else f'mtp{number}'}.bias"


def from_checkpoint(stored: str) -> str | None:
    """The canonical name of a tensor of a checkpoint; None for moments, counts and the like."""
    if stored.startswith("model/"):
        return stored.removeprefix("model/")
    match = re.fullmatch(r"router/(mtp)?(\d+)\.bias", stored)
    if match is None:
        return None
    inside = "moe.router.bias"
    return f"mtp.{match[2]}.block.{inside}" if match[1] else f"layers.{match[2]}.{inside}"


def released_parts(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, Rectangle]]:
    """The released tensors that make up a canonical one, and which rectangle of it each of them is."""
    parts = names.to_hf(name, config)
    rows = shape[0] // len(parts)
    for index, part in enumerate(parts):
        yield part, Rectangle((index * rows, *(0 for _ in shape[1:])), (rows, *shape[1:]))
