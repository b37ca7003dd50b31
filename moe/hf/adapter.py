"""Low-rank adapters outside a run: merged into the weights, or as a folder in the format of PEFT, out and in.

PEFT has a pair of matrices for each released module, each expert by itself; A [r, I] is our way down and
B [O, r] our way up. Where ours is one product for two modules (gate and up), both get the same A, and each
its rows of B; a folder whose gate and up have an A each cannot be ours.

PEFT 0.21 with transformers 5, whose experts are fused, applies adapters of attention, head and experts as
they are here, but takes those of dense and shared MLPs, which have the experts' names, for nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.components import component_of
from moe.config import ModelConfig, TuneConfig
from moe.hf import names
from moe.hf.inventory import complete, is_adapter
from moe.model.transformer import Transformer
from parallel.errors import UserError
from parallel.files import new_folder, sync
from parallel.shards import parameter_pieces

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Read = Callable[[str], Tensor]  # a canonical tensor, whole, by its name


def adapter_of(name: str) -> tuple[str, str]:
    """The canonical names of the adapter of a weight: its way down and its way up."""
    layer = "head_" if name == "head" else name.removesuffix("weight")
    return f"{layer}lora.down.weight", f"{layer}lora.up.weight"


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """weight + scale x up down, [O, I] from [O, I], [r, I] and [O, r]: in fp32, rounded once."""
    return torch.addmm(weight.float(), up.float(), down.float(), alpha=scale).to(weight.dtype)


def adapted(config: ModelConfig, tune: TuneConfig) -> list[str]:
    """The canonical weights of the whole model that carry adapters."""
    return [
        name
        for name, shape in complete(config).items()
        if component_of(name) in tune.lora_targets and len(shape) == 2
    ]


def save_adapter(folder: Path, config: ModelConfig, tune: TuneConfig, read: Read, base: str | None) -> None:
    """Write every adapter, read by its canonical name, to a new folder in PEFT's format.

    `base`: what the adapters belong to, a folder or a name on the hub.
    """
    tensors: dict[str, Tensor] = {}
    for name in adapted(config, tune):
        down, up = (read(half).cpu() for half in adapter_of(name))
        modules = _modules(name, config)
        for module, rows in zip(modules, up.chunk(len(modules)), strict=True):
            tensors[_key(module, "A")] = down.clone()  # safetensors wants memory of its own for each
            tensors[_key(module, "B")] = rows.contiguous()
    settings = {
        **_fixed(tune),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": _targets(config, tune),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with new_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in (WEIGHTS, SETTINGS):
            sync(partial / file)


@torch.no_grad()
def load_adapter(model: Transformer, tune: TuneConfig, folder: Path) -> None:
    """Fill the adapters that this rank holds from a folder in PEFT's format.

    UserError, naming file and tensor or field, where it is not made for exactly these adapters.
    """
    _check_settings(folder, tune)
    known = {
        _key(module, half)
        for name in adapted(model.config, tune)
        for module in _modules(name, model.config)
        for half in "AB"
    }
    with ExitStack() as stack:
        stored = _open(folder, stack)
        unlike = sorted(known.symmetric_difference(stored.keys()))
        if unlike:
            problem = "lacks" if unlike[0] in known else "has"
            raise UserError(
                f"`{folder / WEIGHTS}` must hold the adapters that `tune.lora_targets` names, but {problem} "
                f"`{unlike[0]}`: set `tune.lora_targets` to what it was made with"
            )
        for piece in parameter_pieces(model):
            if is_adapter(piece.name):
                tensor = _read(stored, piece.name, model.config)
                if tensor.shape != piece.shape:
                    raise UserError(
                        f"`{piece.name}` from `{folder / WEIGHTS}` must have shape {piece.shape}, but has "
                        f"{tuple(tensor.shape)}: use the model that it was made for"
                    )
                piece.tensor.copy_(tensor[piece.place])


def _read(stored: Any, name: str, config: ModelConfig) -> Tensor:
    """One of our halves from those of its modules."""
    layer, _, half = name.rpartition("lora.")
    modules = _modules("head" if layer == "head_" else f"{layer}weight", config)
    if half == "up.weight":
        return torch.cat([stored.get_tensor(_key(module, "B")) for module in modules])
    first, *others = (stored.get_tensor(_key(module, "A")) for module in modules)
    if any(not torch.equal(first, other) for other in others):
        raise UserError(
            f"`{_key(modules[0], 'A')}` and that of `{modules[1]}` must be equal, as they are one product "
            "here, but differ: merge the adapter into its model instead"
        )
    return first


def _modules(name: str, config: ModelConfig) -> list[str]:
    """The released modules that one of our weights stands for."""
    return [part.removesuffix(".weight") for part in names.to_hf(name, config)]


def _key(module: str, half: str) -> str:
    return f"base_model.model.{module}.lora_{half}.weight"


def _targets(config: ModelConfig, tune: TuneConfig) -> list[str]:
    """The shortest ends of module names that mean the adapted modules and no other."""
    wanted = set(adapted(config, tune))
    others = {
        end
        for name, shape in complete(config).items()
        if name not in wanted and len(shape) == 2
        for module in _modules(name, config)
        for end in _ends(module)
    }
    return sorted(
        {
            next(end for end in _ends(module) if end not in others)
            for name in wanted
            for module in _modules(name, config)
        }
    )


def _ends(module: str) -> Iterator[str]:
    """`c`, `b.c` and `a.b.c` of `a.b.c`."""
    parts = module.split(".")
    return (".".join(parts[begin:]) for begin in reversed(range(len(parts))))


def _fixed(tune: TuneConfig) -> dict[str, Any]:
    """What decides what the tensors mean, and nothing else may be asked for."""
    return {
        "peft_type": "LORA",
        "r": tune.lora_rank,
        "lora_alpha": tune.lora_alpha,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def _check_settings(folder: Path, tune: TuneConfig) -> None:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` must be readable JSON, but is not ({error}): copy it again") from None
    remedies = {"r": "tune.lora_rank", "lora_alpha": "tune.lora_alpha"}
    for field, wanted in _fixed(tune).items():
        found = settings.get(field, wanted)
        if found != wanted:
            remedy = f"set `{remedies[field]}={found}`" if field in remedies else "merge it into its model"
            raise UserError(f"`{field}` of `{path}` must be {wanted}, but is {found}: {remedy}")


def _open(folder: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(folder / WEIGHTS, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"`{folder / WEIGHTS}` must be a safetensors file, but is not ({error}): copy it again"
        ) from None
