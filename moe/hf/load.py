"""Reading released weights into a model: tensor by tensor, each rank only what it holds.

A file is memory-mapped and a tensor is copied straight to its place, so that no more than one tensor
is held beside the model. All names and shapes are checked before the first is read.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.hf import names
from moe.hf.config import from_hf, lost_from_hf
from moe.hf.fp8 import FP8, read_dequantized, scales_shape
from moe.hf.inventory import complete, is_bias, model_pieces
from moe.model.transformer import Transformer
from parallel.collectives import ALONE, ModelGroups
from parallel.errors import UserError
from parallel.shards import Piece

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Stored(NamedTuple):
    path: Path
    handle: Any


def open_model(
    folder: Path, *, groups: ModelGroups = ALONE, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of a folder with `config.json` and safetensors; what it cannot keep is logged.

    MTP modules that the configuration counts but the files lack (transformers saves none) are left out.
    """
    config_json = _read_json(folder / "config.json", "a Hugging Face model folder has one")
    for sentence in lost_from_hf(config_json):
        logger.warning("%s: %s", folder, sentence)
    config, balance = from_hf(config_json)
    with ExitStack() as stack:
        stored = _open_files(folder, stack)
    present = [names.to_hf(f"mtp.{k}.projection.weight", config)[0] for k in range(config.num_mtp_layers)]
    num_mtp_layers = sum(name in stored for name in present)
    if num_mtp_layers < config.num_mtp_layers:
        logger.warning(
            "%s: config.json counts %d MTP modules, but the files hold %d: the others are left out",
            folder,
            config.num_mtp_layers,
            num_mtp_layers,
        )
        config = dataclasses.replace(config, num_mtp_layers=num_mtp_layers)
    model = Transformer(config, balance, groups, dtype, seed=None)
    load(model, folder)
    return model


@torch.no_grad()
def load(model: Transformer, folder: Path) -> None:
    """Fill a model from `model.safetensors`, or the sharded set and its index, in a folder.

    Values are cast to the model's dtypes; biases stay fp32. UserError, naming file and tensor, for
    anything missing, unexpected or of another shape.
    """
    with ExitStack() as stack:
        stored = _open_files(folder, stack)
        _check_names(model, folder, stored)
        for name, part in _parts(model):
            if name not in stored:
                raise UserError(
                    f"`{folder}` must hold the tensor `{name}`, but lacks it: copy the whole model again "
                    "or use the configuration it was saved with"
                )
            path, handle = stored[name]
            shape = tuple(handle.get_slice(name).get_shape())
            if shape != part.shape:
                raise UserError(
                    f"`{name}` in `{path}` must have shape {part.shape}, but has {shape}: "
                    "use the configuration that the weights were trained with"
                )
            _check_scales(folder, stored, name)
        for name, part in _parts(model):
            part.tensor.copy_(_read(stored, name, part))
    _settle_biases(model, folder)


def _read(stored: dict[str, _Stored], name: str, part: Piece) -> Tensor:
    weight, scales = stored[name].handle.get_slice(name), stored.get(name + names.SCALES)
    if scales is None:
        return weight[part.place]
    return read_dequantized(weight, scales.handle.get_slice(name + names.SCALES), part.place)


def _parts(model: Transformer) -> Iterator[tuple[str, Piece]]:
    """(released name, piece of that tensor) of all that this rank reads."""
    for piece in model_pieces(model):
        if is_bias(piece.name) and model.config.score_function == "softmax":
            continue
        parts = names.to_hf(piece.name, model.config)
        rows = piece.shape[0] // len(parts)
        begin, end = piece.place[0].start, piece.place[0].stop
        for index, name in enumerate(parts):  # gate and up are one tensor here, two in the files
            low, high = max(begin, index * rows), min(end, (index + 1) * rows)
            if low < high:
                offset = (low - index * rows, *piece.offset[1:])
                shape = (rows, *piece.shape[1:])
                yield name, Piece(name, shape, offset, piece.tensor[low - begin : high - begin])


def _check_scales(folder: Path, stored: dict[str, _Stored], name: str) -> None:
    """An fp8 weight has a scale for each of its blocks, and another has none."""
    weight, scales = stored[name].handle.get_slice(name), stored.get(name + names.SCALES)
    wanted = scales_shape(weight.get_shape()) if weight.get_dtype() == FP8 else None
    found = tuple(scales.handle.get_slice(name + names.SCALES).get_shape()) if scales else None
    if found != wanted:
        raise UserError(
            f"`{name}{names.SCALES}` must have shape {wanted} beside a weight of type {weight.get_dtype()}, "
            f"but has {found} (None: is not there) in `{folder}`: copy the whole model again"
        )


def _settle_biases(model: Transformer, folder: Path) -> None:
    for layer, router in model.routers():
        if model.config.score_function == "softmax":
            router.bias.zero_()  # only a V3 file has one
        elif router.balance.bias == "none" and router.bias.any():
            raise UserError(
                f"`balance.bias` must be update or frozen for `{folder}`, since layer {layer} has a bias, "
                "but is none: set `balance.bias=frozen`"
            )


def _check_names(model: Transformer, folder: Path, stored: dict[str, _Stored]) -> None:
    """Nothing in the files may go unread but copies, tables of RoPE, and MTP modules that were not built."""
    config, known = model.config, complete(model.config)
    for name, (path, _) in stored.items():
        found = names.from_hf(name, config)
        if names.carries_nothing(name, config) or (found is not None and found[0] in known):
            continue
        if (
            found is not None
            and found[0].startswith("mtp.")
            and int(found[0].split(".")[1]) >= config.num_mtp_layers
        ):
            continue
        raise UserError(
            f"`{path}` must hold only tensors of the configured model, but has `{name}`: "
            "use the configuration that the weights were trained with"
        )


def _open_files(folder: Path, stack: ExitStack) -> dict[str, _Stored]:
    """Every tensor's file and open handle."""
    if (folder / INDEX).exists():
        index = _read_json(folder / INDEX, "it lists the shards").get("weight_map", {})
    elif (folder / SINGLE).exists():
        index = {}
    else:
        shards = len(list(folder.glob("*.safetensors")))
        problem = f"has {shards} safetensors files but neither" if shards else "has neither"
        raise UserError(
            f"`{folder}` must hold {SINGLE} or {INDEX}, but {problem}: copy the whole model again"
        )
    stored: dict[str, _Stored] = {}
    for file in sorted(set(index.values())) or [SINGLE]:
        path = folder / file
        handle = stack.enter_context(_open_file(path))
        stored.update(dict.fromkeys(handle.keys(), _Stored(path, handle)))
    for name, file in index.items():
        if name not in stored:
            raise UserError(
                f"`{folder / file}` must hold `{name}` as {INDEX} says, but does not: copy both again"
            )
    return stored


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(
            f"`{path}` is listed in {INDEX}, but does not exist: copy the whole model again"
        ) from None
    except SafetensorError as error:
        raise UserError(
            f"`{path}` must be a whole safetensors file, but is not ({error}): copy it again"
        ) from None


def _read_json(path: Path, purpose: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"`{path}` must exist ({purpose}), but does not: copy the whole model again"
        ) from None
    except ValueError as error:
        raise UserError(f"`{path}` must be JSON, but is not ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"`{path}` must be a JSON object, but is {type(value).__name__}: copy it again")
    return value
