"""A Hugging Face model folder as its headers describe it: tensors, settings, checksums, companions. No torch.

Nothing of a weight is read but headers, so whatever is wrong with names, shapes or lengths is known at once.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import BalanceConfig, ModelConfig
from moe.hf import names
from moe.hf.config import from_hf, lost_from_hf
from parallel.errors import UserError
from parallel.files import sha256_of

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SUMS = "SHA256SUMS"
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_COMPANION_BYTES = 1 << 27  # a larger file is no tokenizer
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Stored(NamedTuple):
    """A tensor of a file, as its header says."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of `model.safetensors`, or of the sharded set and its index."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "it lists the shards").get("weight_map", {})
    elif (folder / SINGLE).exists():
        index = {}
    else:
        shards = len(list(folder.glob("*.safetensors")))
        problem = f"has {shards} safetensors files but neither" if shards else "has neither"
        raise UserError(
            f"`{folder}` must hold {SINGLE} or {INDEX}, but {problem}: copy the whole model again"
        )
    stored = {}
    for file in sorted(set(index.values())) or [SINGLE]:
        path = folder / file
        for name, entry in read_header(path).items():
            if name != "__metadata__":
                stored[name] = Stored(path, entry["dtype"], tuple(entry["shape"]))
    for name, file in index.items():
        if name not in stored:
            raise UserError(
                f"`{folder / file}` must hold `{name}` as {INDEX} says, but does not: copy both again"
            )
    return stored


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, whose length it must agree with."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size:
                raise ValueError("it ends inside the header")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise ValueError(f"{size} bytes instead of {8 + length + max(ends, default=0)}")
        return dict(header)
    except FileNotFoundError:
        raise UserError(
            f"`{path}` is listed in {INDEX}, but does not exist: copy the whole model again"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"`{path}` must be a whole safetensors file, but is not ({error}): copy it again"
        ) from None


def read_settings(
    folder: Path, stored: dict[str, Stored] | None = None
) -> tuple[ModelConfig, BalanceConfig, list[str]]:
    """Our configuration of a folder, and a sentence for everything of its own that is lost.

    MTP modules that `config.json` counts but the files lack (transformers saves none) are left out.
    """
    config_json = read_json(folder / CONFIG, "a Hugging Face model folder has one")
    config, balance = from_hf(config_json)
    stored = read_tensors(folder) if stored is None else stored
    modules = [names.to_hf(f"mtp.{k}.projection.weight", config)[0] for k in range(config.num_mtp_layers)]
    present = sum(name in stored for name in modules)
    lost = lost_from_hf(config_json)
    if present < config.num_mtp_layers:
        lost.append(
            f"config.json counts {config.num_mtp_layers} MTP modules, but the files hold {present}: "
            "the others are left out"
        )
    return dataclasses.replace(config, num_mtp_layers=present), balance, lost


def identity(path: Path) -> str:
    """A checksum of a file's header and of samples of its content, that tells two trainings apart."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(length))
        for sample in range(_SAMPLES):
            file.seek(8 + length + (size - 8 - length) * sample // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_sum(path: Path, sums: dict[str, str]) -> None:
    """Compare a file with its line of SHA256SUMS, where there is one."""
    expected = sums.get(path.name)
    if expected is not None and sha256_of(path) != expected:
        raise UserError(f"`{path}` must have the checksum that {SUMS} gives, but has not: copy it again")


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums of a folder by file name, as `sha256sum` writes them; none where there are none."""
    path = folder / SUMS
    if not path.exists():
        return {}
    rows = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    if any(len(row) != 2 or len(row[0]) != 64 for row in rows):
        raise UserError(f"`{path}` must hold lines of `sha256sum`, but does not: copy it again or remove it")
    return {name.lstrip("*").removeprefix("./"): digest.lower() for digest, name in rows}


def companions(folder: Path) -> Iterator[Path]:
    """The small files of a folder that are no weights: tokenizer, chat template, generation settings, ..."""
    for path in sorted(folder.iterdir()):
        is_weight = path.name.endswith(_WEIGHTS) or path.name == SUMS or path.name.startswith(".")
        if path.is_file() and not is_weight and path.stat().st_size <= _COMPANION_BYTES:
            yield path


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """The object that a JSON file holds; UserError where it does not."""
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
