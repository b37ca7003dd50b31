"""What of a model is trained: the rest is frozen, and gets adapters beside it or experts of its own.

A frozen parameter has no gradient, no master, no moment and no place in a checkpoint: it comes from where
the run's weights began. Hidden states and the exchanges of their gradients are the same whatever is frozen.
"""

from collections.abc import Collection
from pathlib import Path

import torch

from moe.components import component_of
from moe.config import RunConfig, TuneConfig
from moe.hf.adapter import load_adapter
from moe.hf.inventory import is_adapter
from moe.model.experts import Placement
from moe.model.init import init_adapters
from moe.model.transformer import Transformer
from moe.placement import orders_of
from moe.selection import Selection, read_selection
from moe.train.units import parameter_units
from parallel.collectives import all_reduce, group_rank
from parallel.groups import Groups
from parallel.linear import GroupedLinear, Linear
from parallel.lora import attach
from parallel.shards import pieces


def selection_of(config: RunConfig) -> Selection | None:
    """The experts that the settings train, where they train some only."""
    if config.tune.method != "esft":
        return None
    assert config.tune.selection is not None, "rules.py asks for one"
    return read_selection(Path(config.tune.selection), config.model)


def placements(config: RunConfig, ep: int) -> dict[str, Placement]:
    """Which experts live where, by layer, and which are trained; needed to make a model."""
    selection = selection_of(config)
    return {
        layer: Placement(order, None if selection is None else frozenset(selection.experts.get(layer, ())))
        for layer, order in orders_of(config, ep).items()
    }


def prepare(model: Transformer, config: RunConfig, saved: Collection[str] = ()) -> None:
    """Freeze what is not trained and make the adapters of a model whose own weights are in place.

    `saved` are the tensors of the checkpoint that is read afterwards.
    """
    shape(model, config)
    if config.tune.method == "lora":
        init_adapters(model, config.train.seed)
        if config.tune.adapter is not None and not any(map(is_adapter, saved)):
            load_adapter(model, config.tune, Path(config.tune.adapter).expanduser())


def shape(model: Transformer, config: RunConfig) -> None:
    """Freeze what is not trained and attach adapters, uninitialised."""
    tune = config.tune
    if tune.method == "lora":
        model.requires_grad_(False)
        attach_adapters(model, tune)
    selection = selection_of(config)
    for name, parameter in model.named_parameters():
        if component_of(name) in tune.frozen:
            parameter.requires_grad_(False)
        if selection is not None:
            held = pieces(name, parameter, parameter.detach().view(-1))
            trained = {selection.trains(piece.name) for piece in held}
            assert len(trained) <= 1, f"{name} is trained in part"
            parameter.requires_grad_(True in trained)


def attach_adapters(model: Transformer, tune: TuneConfig) -> None:
    """Give every product of the targeted components an adapter, uninitialised."""
    products = [
        (name, each) for name, each in model.named_modules() if isinstance(each, (Linear, GroupedLinear))
    ]
    for name, product in products:
        if component_of(f"{name}.weight") in tune.lora_targets:
            attach(product, tune.lora_rank, tune.lora_scale)
    if "head" in tune.lora_targets:
        model.attach_to_head(tune.lora_rank, tune.lora_scale)


def trained_share(model: Transformer, groups: Groups, device: torch.device) -> str:
    """What is trained of the whole model, in words. Every rank must call."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for _, sets in parameter_units(model, groups):
        for chosen in sets:
            if group_rank(chosen.replicas) == 0:  # one rank speaks for each parameter
                for _, parameter in chosen.named:
                    counts += parameter.numel() * torch.tensor([parameter.requires_grad, 1], device=device)
    trained, every = all_reduce(counts, groups.world).tolist()
    return f"trains {trained:,} of {every:,} parameters ({trained / every:.2%})"
