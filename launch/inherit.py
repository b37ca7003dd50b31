"""`train.init`: a new run takes the shape of its model, and its tokenizer, from the weights it begins with.

A recipe need not repeat the model, and what it says of it does not count; only what the command line
says is held against the weights. Free to differ are settings that change no trained tensor's meaning:
further MTP modules, capacity, the scale of fresh weights, and RoPE and length, to extend the context.
No torch.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.config import BalanceConfig, ModelConfig, RunConfig
from moe.hf.places import Place, find
from parallel.errors import UserError

TOKENIZER = "tokenizer.json"
_FREE = ("num_mtp_layers", "capacity_factor", "init_std", "rope", "max_context")
_BALANCE = ("bias", "sequence_aux", "microbatch_aux", "global_aux")


def begin_from(config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings of a new run whose weights come from `train.init`, and what its user should know.

    `overrides` are the command line's `KEY=VALUE`. UserError where they ask for another model.
    """
    if config.train.init is None:
        return config, ()
    path = Path(config.train.init).expanduser().resolve()
    place = find(path)
    model, balance, lost = place.settings()
    keys = [text.partition("=")[0].lstrip("+") for text in overrides]
    given = [key for key in keys if key.split(".")[0] == "model"]
    model = _with_overrides(config.model, model, given, path)
    if "model.capacity_factor" not in given:  # how a run is trained, not what its weights are
        model = replace(model, capacity_factor=config.model.capacity_factor)
    config = replace(config, model=model, train=replace(config.train, init=str(path)))
    config = replace(config, data=replace(config.data, tokenizer=_tokenizer(config, place)))
    return config, (*lost, *_other_balance(config.balance, balance, path))


def _with_overrides(wanted: ModelConfig, found: ModelConfig, keys: Sequence[str], path: Path) -> ModelConfig:
    """The weights' model, with what the command line may change."""
    for key in keys:
        names = key.split(".")[1:]
        mine, theirs = (functools.reduce(getattr, names, each) for each in (wanted, found))
        if names and names[0] in _FREE:
            found = _replaced(found, names, mine)
        elif mine != theirs:
            raise UserError(
                f"`{key}` must be {theirs} as in `train.init={path}`, but is {mine}: leave it out to train "
                "that model"
            )
    return found


def _replaced(config: Any, names: Sequence[str], value: object) -> Any:
    """A config with one setting changed, however deep it lies."""
    first, *rest = names
    return replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def _tokenizer(config: RunConfig, place: Place) -> str:
    """The one that the weights were trained with, unless another is named."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    found = [path for path in place.companions() if path.name == TOKENIZER]
    if not found:
        raise UserError(
            f"`data.tokenizer` must name the tokenizer of the weights, since `train.init={place.folder}` has "
            f"no {TOKENIZER}: set it"
        )
    return str(found[0])


def _other_balance(mine: BalanceConfig, theirs: BalanceConfig, path: Path) -> Iterator[str]:
    for name in _BALANCE:
        wanted, was = getattr(mine, name), getattr(theirs, name)
        if wanted != was:
            yield f"`balance.{name}` is {wanted!r}, but {was!r} in {path}: the run's own counts"
