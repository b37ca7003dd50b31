"""Writing a model as Hugging Face files: released names, safetensors shards of bounded size, `config.json`.

Tensors come one by one and leave with their shard, so memory holds one shard beside the model. All is
written beside the destination and renamed at the end: a folder that exists is whole.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig
from moe.hf import names
from moe.hf.config import lost_to_hf, to_hf
from moe.hf.inventory import complete, is_bias
from moe.hf.load import INDEX, SINGLE
from parallel.errors import UserError
from parallel.files import sync

logger = logging.getLogger(__name__)


def save(
    folder: Path,
    config: ModelConfig,
    balance: BalanceConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    eos_token_id: int | None = None,
) -> None:
    """Write canonical (name, tensor) pairs, in any order, to a new folder.

    `tensors` are those of a whole model (`inventory.model_tensors` without expert parallelism) or of a
    checkpoint. Values are cast to `dtype`, unless None; biases stay fp32. What the format cannot hold is
    logged. UserError when the folder holds anything or a tensor is missing or has another shape.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`{folder}` must be new or empty, but is not: choose another folder or remove it")
    config_json = to_hf(config, balance, eos_token_id=eos_token_id)
    for sentence in lost_to_hf(config, balance):
        logger.warning("%s: %s", folder, sentence)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtypes = _write_shards(partial, _released(config, tensors, dtype), shard_bytes)
        config_json["torch_dtype"] = str(dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
        _write_json(partial / "config.json", config_json)
        sync(partial)
        os.replace(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _released(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """(released name, copy on the CPU) of every tensor; checks that each comes once, in its shape."""
    missing = complete(config)
    for name, tensor in tensors:
        if is_bias(name) and config.score_function == "softmax":
            continue
        assert name in missing, f"{name} came twice or is no tensor of this model"
        shape = missing.pop(name)
        if tensor.shape != shape:
            raise UserError(
                f"`{name}` must have shape {tuple(shape)}, but has {tuple(tensor.shape)}: "
                "use the configuration that the weights were trained with"
            )
        kept = torch.float32 if is_bias(name) else dtype
        parts = names.to_hf(name, config)
        copies = names.mtp_copies(name, config)
        pieces = [*tensor.detach().chunk(len(parts)), *[tensor.detach()] * len(copies)]
        for part, piece in zip((*parts, *copies), pieces, strict=True):
            yield part, piece.to("cpu", kept or piece.dtype, copy=True).contiguous()
    if missing:
        raise UserError(
            f"an exported model must be whole, but lacks {len(missing)} tensors, the first "
            f"`{next(iter(missing))}`: give the tensors of every rank"
        )


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> dict[str, torch.dtype]:
    """Write shards and, if there is more than one, their index; return what was written."""
    dtypes: dict[str, torch.dtype] = {}
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        path = folder / f"{len(shards)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        sync(path)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        dtypes[name] = tensor.dtype
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    else:
        weight_map = {name: file for file, held in zip(files, shards, strict=True) for name in held}
        _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    for number, file in enumerate(files):
        os.replace(folder / f"{number}.safetensors", folder / file)
    return dtypes


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(path)
