"""Writing a model as Hugging Face files: released names, safetensors shards of bounded size, `config.json`.

The shards are planned from names and shapes alone, in the order of layers; whoever writes one reads its
tensors one by one (parallel/assembly.py), so that processes share the work and memory holds one tensor.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig
from moe.hf import names
from moe.hf.config import lost_to_hf, to_hf
from moe.hf.folder import CONFIG, INDEX, SINGLE, SUMS
from moe.hf.inventory import complete, is_bias, released_parts
from moe.hf.tensors import Held, Weights
from moe.hf.weights import Opened
from parallel.assembly import Assembly, Finish, Part, PlannedFile
from parallel.errors import UserError
from parallel.files import durable_file, sha256_of
from parallel.rectangles import Rectangle
from parallel.runs import runs
from parallel.shards import Piece

SHARD_BYTES = 5 * 10**9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """The files of a folder to be made, and what is put beside them once they are there."""

    files: tuple[PlannedFile, ...]
    finish: Finish

    @property
    def nbytes(self) -> int:
        """Bytes of content of all files."""
        return sum(file.nbytes for file in self.files)


def save(
    folder: Path,
    config: ModelConfig,
    balance: BalanceConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    eos_token_id: int | None = None,
) -> None:
    """Write a model in memory, as canonical (name, tensor) pairs in any order, to a new folder.

    Values are cast to `dtype`, unless None; biases stay fp32. What the format cannot hold is logged.
    UserError when the folder holds anything or a tensor is missing or has another shape.
    """
    opened = Opened(folder, config, balance, Held(tensors))
    config_json = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
    plan = export(folder, opened, dtype=dtype, shard_bytes=shard_bytes, config_json=config_json)
    with Assembly(folder) as assembly:
        assembly.begin(plan.files)
        try:
            assembly.write(plan.files)
            assembly.publish(plan.files, plan.finish)
        except BaseException:  # what is in memory cannot be asked for again
            assembly.drop()
            raise


def export(
    folder: Path,
    opened: Opened,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int = SHARD_BYTES,
    config_json: dict[str, Any] | None = None,
    companions: Sequence[Path] = (),
) -> Conversion:
    """Plan a Hugging Face folder; arguments as those of `save`.

    `config_json` are values that are ours to keep, not to decide (`eos_token_id`); `companions` are
    copied. What the format cannot hold is logged.
    """
    config, balance, weights = opened.config, opened.balance, opened.weights
    for sentence in lost_to_hf(config, balance):
        logger.warning("%s: %s", folder, sentence)
    _check(config, weights)
    shards = list(runs(_parts(config, weights, dtype), lambda part: part.nbytes, shard_bytes))
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    origin = weights.origin
    planned = tuple(
        PlannedFile(file, shard, origin, {}, lambda: None) for file, shard in zip(files, shards, strict=True)
    )
    kept = weights.dtype("embedding.weight") if dtype is None else dtype
    settings = to_hf(config, balance) | (config_json or {})
    settings["torch_dtype"] = str(kept).removeprefix("torch.")
    return Conversion(planned, partial(_finish, planned, settings, companions))


def _check(config: ModelConfig, weights: Weights) -> None:
    expected = complete(config)
    missing = [name for name in expected if name not in weights.names]
    if missing:
        raise UserError(
            f"an exported model must be whole, but lacks {len(missing)} tensors, the first "
            f"`{missing[0]}`: give the tensors of every rank"
        )
    for name in weights.names:
        if name not in expected and not is_bias(name):
            raise UserError(
                f"an exported model must hold only what its files can, but has `{name}`: merge it first"
            )
    for name, shape in expected.items():
        if weights.shape(name) != tuple(shape):
            raise UserError(
                f"`{name}` must have shape {tuple(shape)}, but has {weights.shape(name)}: "
                "use the configuration that the weights were trained with"
            )


def _parts(config: ModelConfig, weights: Weights, dtype: torch.dtype | None) -> Iterator[Part]:
    """Every released tensor, copies in MTP modules too, layer by layer."""
    for name, shape in sorted(complete(config).items(), key=lambda item: _order(item[0], config)):
        kept = torch.float32 if is_bias(name) else dtype or weights.dtype(name)
        whole = Rectangle((0,) * len(shape), tuple(shape))
        copies = [(copy, whole) for copy in names.mtp_copies(name, config)]
        for released, place in [*released_parts(name, tuple(shape), config), *copies]:
            read = partial(_read, weights, name, tuple(shape), place, kept)
            yield Part(released, kept, place.extent, read)


def _read(
    weights: Weights, name: str, shape: tuple[int, ...], place: Rectangle, dtype: torch.dtype
) -> Tensor:
    tensor = torch.empty(place.extent, dtype=dtype)
    weights.read_into(Piece(name, shape, place.offset, tensor))
    return tensor


def _order(name: str, config: ModelConfig) -> int:
    """Embedding, layers, MTP modules, norm and head."""
    match = re.match(r"(layers|mtp)\.(\d+)\.", name)
    if match is None:
        return -1 if name.startswith("embedding.") else config.num_layers + config.num_mtp_layers
    return int(match[2]) + (config.num_layers if match[1] == "mtp" else 0)


def _finish(
    files: Sequence[PlannedFile],
    config_json: dict[str, Any],
    companions: Sequence[Path],
    folder: Path,
    entries: dict[str, dict[str, Any]],
) -> None:
    """Companions, `config.json`, the index where there are several shards, and the checksums of all files."""
    for path in companions:
        if path.name not in (CONFIG, INDEX, SUMS):
            write(folder / path.name, path.read_bytes())
    write_pretty(folder / CONFIG, config_json)
    if len(files) > 1:
        weight_map = {part.key: file.name for file in files for part in file.parts}
        total = sum(file.nbytes for file in files)
        write_pretty(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    sums = {name: entry["sha256"] for name, entry in entries.items()}
    others = [path for path in folder.iterdir() if path.name not in (*sums, SUMS)]
    sums |= {path.name: sha256_of(path) for path in others}
    write(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


def write_pretty(path: Path, value: dict[str, Any]) -> None:
    """JSON for people to read, on the disk."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Bytes, on the disk."""
    with durable_file(path) as file:
        file.write(content)
