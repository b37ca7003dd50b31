"""From released files to a model folder of ours, file by file, and back.

Every released tensor is a rectangle of one canonical tensor, so a shard becomes one file of a
checkpoint (parallel/checkpoint.py) without its neighbours: gate and up rows meet in the index. dtypes
stay as stored; biases are fp32. The folder is laid out like a run (moe/hf/places.py):

    OUT/config.yaml   OUT/checkpoints/step-0/{model-00001-of-000004.safetensors, ..., index.json}   OUT/hf/
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moe.data.tokenizer import TOKENIZER, end_of_document, open_tokenizer
from moe.hf import folder as hf
from moe.hf.esft import merged
from moe.hf.inventory import in_checkpoint
from moe.hf.places import CHECKPOINTS, COMPANIONS, SETTINGS, find
from moe.hf.save import SHARD_BYTES, Conversion, export, write
from moe.hf.weights import Released, open_weights
from parallel.assembly import Part, PlannedFile
from parallel.checkpoint import DTYPE_NAMES, INDEX, key
from parallel.errors import UserError
from parallel.files import write_json
from parallel.saving import make_index

STEP = f"{CHECKPOINTS}/step-0"
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # of a released config.json: the tokenizer's business

logger = logging.getLogger(__name__)


def plan_from_hf(source: Path) -> Conversion:
    """Plan the model folder of a Hugging Face folder, from its headers; what is lost is logged."""
    place = find(source)
    if not place.is_hf:
        raise UserError(
            f"`{source}` must be a Hugging Face folder with config.json, but is one of ours already"
        )
    for sentence in place.settings()[2]:
        logger.warning("%s: %s", source, sentence)
    released, sums = Released(source), hf.read_sums(source)
    files = tuple(_plan_file(released, path, sums) for path in released.files)
    return Conversion(files, partial(_finish, released))


def plan_to_hf(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    shard_bytes: int = SHARD_BYTES,
    adapter: Path | None = None,
) -> Conversion:
    """Plan the Hugging Face folder of a run, checkpoint or model folder, whose checksums were verified.

    The tensors of an ESFT `adapter` take the place of its own.
    """
    place = find(source)
    companions = place.companions()
    for sentence in place.settings()[2]:
        logger.warning("%s: %s", source, sentence)
    opened = open_weights(source)
    return export(
        target,
        opened if adapter is None else merged(opened, adapter),
        dtype=dtype,
        shard_bytes=shard_bytes,
        config_json=_special_tokens(companions),
        companions=companions,
    )


def verified(source: Path) -> Path:
    """Compare what is to be converted with its checksums; of a run, the checkpoint that was found good."""
    return open_weights(source, verify=True).path


def _special_tokens(companions: Iterable[Path]) -> dict[str, Any]:
    """What a new `config.json` takes over from the old one, or else from the tokenizer."""
    paths = {path.name: path for path in companions}
    if hf.CONFIG in paths:
        before = hf.read_json(paths[hf.CONFIG], "it came with the weights")
        return {name: before[name] for name in _KEPT if name in before}
    if TOKENIZER in paths:
        return {"eos_token_id": end_of_document(open_tokenizer(str(paths[TOKENIZER])))}
    return {}


def _plan_file(released: Released, path: Path, sums: dict[str, str]) -> PlannedFile:
    parts, pieces = [], []
    for name, stored in released.stored.items():
        place = released.locate(name) if stored.path == path else None
        if place is None:
            continue
        ours, rectangle = place
        dtype, shape, saved = released.dtype(ours), released.shape(ours), in_checkpoint(ours)
        pieces.append([saved, DTYPE_NAMES[dtype], shape, rectangle.offset, rectangle.extent])
        parts.append(
            Part(key(saved, rectangle), dtype, rectangle.extent, partial(_read, released, name, dtype))
        )
    check = partial(hf.check_sum, path, sums)
    return PlannedFile(f"{STEP}/{path.name}", parts, hf.identity(path), {"pieces": pieces}, check)


def _read(released: Released, name: str, dtype: torch.dtype) -> Tensor:
    return released.read(name, tuple(slice(0, n) for n in released.stored[name].shape)).to(dtype)


def _finish(released: Released, folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """The checkpoint's index, the settings, and the companions."""
    files = {name.removeprefix(f"{STEP}/"): entry for name, entry in entries.items()}
    write_json(folder / STEP / INDEX, make_index(files, {"step": 0}))
    (folder / COMPANIONS).mkdir(exist_ok=True)
    for path in hf.companions(released.folder):
        write(folder / COMPANIONS / path.name, path.read_bytes())
    settings = {"model": asdict(released.config), "balance": asdict(released.balance)}
    write(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
