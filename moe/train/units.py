"""Whose gradients are complete together, and which ranks hold copies of what.

Units are those that the model marks on the tape: its embedding, each layer, its head, each MTP module.
A parameter is either a part of experts, cut over tp, or whole on every rank of its stage; every rank of
a stage sees tokens of its own, so the gradients of all copies are summed. Of experts that are cut over etp
an adapter's smaller half is whole on the ranks that hold the parts, and they are its copies too.
"""

from collections.abc import Sequence

from torch import nn

from moe.model.transformer import Transformer
from parallel.collectives import Group
from parallel.groups import Groups
from parallel.shards import is_cut, is_expert
from parallel.zero import ParameterSet

_ORDER = ("embedding", "layers", "head", "mtp")


def parameter_units(model: Transformer, groups: Groups) -> Sequence[tuple[str, Sequence[ParameterSet]]]:
    """Every parameter of a stage, by unit in forward order and by the ranks that hold its copies."""
    units: dict[str, dict[int, tuple[Group, list[tuple[str, nn.Parameter]]]]] = {}
    named = model.named_parameters()
    for name, parameter in sorted(named, key=lambda pair: _ORDER.index(unit_of(pair[0]).split(".")[0])):
        holders = _holders(name, parameter, model, groups)
        sets = units.setdefault(unit_of(name), {})
        sets.setdefault(id(holders), (holders, []))[1].append((name, parameter))
    return [
        (unit, [ParameterSet(tuple(pairs), holders) for holders, pairs in sets.values()])
        for unit, sets in units.items()
    ]


def unit_of(name: str) -> str:
    """The unit that a parameter belongs to."""
    first, *rest = name.split(".")
    if first in ("layers", "mtp"):
        return f"{first}.{rest[0]}"
    return first if first == "embedding" else "head"


def replicas(parameter: nn.Parameter, groups: Groups) -> Group:
    """The ranks that hold the same values as this one, of a stage or of two."""
    copies = groups.copies
    if is_expert(parameter):
        return copies.experts if is_cut(parameter) else copies.experts_whole
    return copies.cut if is_cut(parameter) else copies.whole


def _holders(name: str, parameter: nn.Parameter, model: Transformer, groups: Groups) -> Group:
    """The same over all stages: MTP and a tied head need the embedding on the last one too."""
    twice = model.config.num_mtp_layers or model.config.tie_embeddings
    both_ends_here = model.parts[0].first and model.parts[-1].last
    if name == "embedding.weight" and twice and not both_ends_here:
        return groups.embedding
    return replicas(parameter, groups)
