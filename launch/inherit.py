"""`train.init`: a new run takes the shape of its model, and its tokenizer, from the weights it begins with.

A recipe need not repeat the model, and what it says of it does not count; only what the command line
says is held against the weights. Free to differ are settings that change no trained tensor's meaning:
further MTP modules, capacity, the scale of fresh weights, and RoPE and length, to extend the context.
A run that is named may go on training, so its newest checkpoint is meant. No torch.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.config import BalanceConfig, DataConfig, ModelConfig, RunConfig
from moe.data.template import CONFIG as TOKENIZER_CONFIG
from moe.data.template import TEMPLATE
from moe.data.tokenizer import TOKENIZER, tokenizer_file
from moe.hf.places import COMPANIONS, Place, find
from moe.placement import read_placement
from moe.selection import read_selection
from parallel.errors import UserError

SELECTION, PLACEMENT = "selection.json", "placement.json"  # in the folder of a run
_FREE = ("num_mtp_layers", "capacity_factor", "init_std", "rope", "max_context")
_BALANCE = ("bias", "sequence_aux", "microbatch_aux", "global_aux")
_BESIDE = (TOKENIZER_CONFIG, TEMPLATE, "special_tokens_map.json", "generation_config.json")


def begin_from(config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings of a new run whose weights come from `train.init`, and what its user should know.

    `overrides` are the command line's `KEY=VALUE`. UserError where they ask for another model, or
    freeze weights that would come from nowhere.
    """
    config = _absolute(config)
    if config.train.init is None:
        if config.tune.is_partial:
            raise UserError(
                "`train.init` must name the weights of which `tune` leaves some as they are, but is null: "
                "set it, or train everything with `tune.method=full tune.frozen=[]`"
            )
        return config, ()
    path = Path(config.train.init)
    place = find(path)
    found, balance, lost = place.settings()
    keys = [text.partition("=")[0].lstrip("+") for text in overrides]
    given = [key for key in keys if key.split(".")[0] == "model"]
    model = _with_overrides(config.model, found, given, path)
    if config.tune.is_partial and model.num_mtp_layers > found.num_mtp_layers:
        raise UserError(
            f"`model.num_mtp_layers` must be at most {found.num_mtp_layers} as in `train.init={path}` where "
            f"`tune` leaves weights as they are, but is {model.num_mtp_layers}: leave it out"
        )
    if "model.capacity_factor" not in given:  # how a run is trained, not what its weights are
        model = replace(model, capacity_factor=config.model.capacity_factor)
    config = replace(config, model=model, train=replace(config.train, init=str(_weights_of(place))))
    config = replace(config, data=replace(config.data, tokenizer=_tokenizer(config, place)))
    return config, (*lost, *_other_balance(config.balance, balance, path))


def go_on(saved: RunConfig, config: RunConfig) -> RunConfig:
    """The settings of a resumed run: what the command line gives again means what it meant at first."""
    config = _absolute(config)
    init, selection, own = config.train.init, config.tune.selection, saved.tune.selection
    if init and saved.train.init and Path(init) in Path(saved.train.init).parents:
        init = saved.train.init  # the checkpoint that was the newest
    if selection and own and saved.tune.method == "esft":
        given, kept = (read_selection(Path(path), saved.model) for path in (selection, own))
        selection = own if given == kept else selection
    return replace(
        config, train=replace(config.train, init=init), tune=replace(config.tune, selection=selection)
    )


def keepsakes(config: RunConfig, tokenizer: Path) -> dict[str, bytes]:
    """Copies that a new run keeps in its folder, by path: what its exports take along, and chosen experts.

    `tokenizer` is that of its corpus.
    """
    found = _companions(config.data, tokenizer, config.train.init)
    kept = {f"{COMPANIONS}/{name}": path.read_bytes() for name, path in found.items()}
    if config.tune.method == "esft" and config.tune.selection is not None:
        chosen = Path(config.tune.selection)
        read_selection(chosen, config.model)  # finds what is wrong with it
        kept[SELECTION] = chosen.read_bytes()
    return kept


def placed(config: RunConfig) -> dict[str, bytes]:
    """The copy of its placement that a run keeps, new or going on; UserError where it does not fit."""
    if config.layout.placement is None:
        return {}
    path = Path(config.layout.placement)
    read_placement(path, config.model, config.layout.ep)
    return {PLACEMENT: path.read_bytes()}


def _companions(data: DataConfig, trained: Path, init: str | None) -> dict[str, Path]:
    """Tokenizer and template, and what belongs to them; all of a model's small files with its tokenizer."""
    given = trained if data.tokenizer is None else tokenizer_file(data.tokenizer)
    theirs = find(Path(init)).companions() if init else []
    if not any(path.samefile(given) for path in theirs):
        beside = () if data.tokenizer is None else map(given.with_name, _BESIDE)
        theirs = [path for path in beside if path.is_file()]
    found = {path.name: path for path in theirs} | {TOKENIZER: given}
    if data.format == "chat" and data.template is not None:
        template = Path(data.template).expanduser()
        found.pop(TEMPLATE, None)  # it stands above a configuration's
        found[TOKENIZER_CONFIG if template.suffix == ".json" else TEMPLATE] = template
    return found


def _absolute(config: RunConfig) -> RunConfig:
    """With paths of what a run takes that mean the same in any folder."""
    init, adapter, selection, placement = (
        path and str(Path(path).expanduser().resolve())
        for path in (config.train.init, config.tune.adapter, config.tune.selection, config.layout.placement)
    )
    return replace(
        config,
        train=replace(config.train, init=init),
        tune=replace(config.tune, adapter=adapter, selection=selection),
        layout=replace(config.layout, placement=placement),
    )


def _weights_of(place: Place) -> Path:
    """Where the weights lie: of a run, its newest checkpoint."""
    if place.is_hf:
        return place.folder
    from moe.hf.weights import open_saved  # imports torch

    return open_saved(place).folder


def _with_overrides(wanted: ModelConfig, found: ModelConfig, keys: Sequence[str], path: Path) -> ModelConfig:
    """The weights' model, with what the command line may change."""
    for key in keys:
        names = key.split(".")[1:]
        mine, theirs = (functools.reduce(getattr, names, each) for each in (wanted, found))
        if names and names[0] in _FREE:
            found = _replaced(found, names, mine)
        elif mine != theirs:
            rule = f"{theirs} as in `train.init={path}`, but is {mine}"
            if not names:  # `model=NAME`
                rule = f"that of `train.init={path}`, but is another"
            raise UserError(f"`{key}` must be {rule}: leave it out to train that model")
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
