"""Which experts of a layer live on which expert-parallel rank, from measured load. No torch.

A step waits for the rank whose experts receive the most rows, so a layer's cost is the sum over steps of the
busiest rank's rows; those of the summed load would hide ranks that are busy in turn. Ranks hold equally
many experts, and none is replicated. As in DeepSeek's EPLB (github.com/deepseek-ai/EPLB) experts are packed
greedily, the heaviest first, to the lightest rank with a free seat; and where nodes can hold whole groups
of a group-limited router, groups are packed to nodes before, so that a token still reaches few nodes. What
is added are swaps of two experts, as long as one makes the cost less.

Load is assignments: what a capacity then drops is not recorded by expert. The file:

    {"ep": 8, "placement": {"3": [the expert in each seat], ..., "mtp0": [...]}, ...}

Legend: S steps, E experts or other items, R ranks or other bins, X items to swap with.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.config import ModelConfig, RunConfig
from moe.selection import read_selection, released_numbers, spread
from parallel.errors import UserError

Integers = NDArray[np.int64]
Order = tuple[int, ...]  # the expert in each seat


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """How ranks and experts are grouped: `groups` of a group-limited router and `nodes` of ranks."""

    nodes: int = 1
    groups: int = 1

    @property
    def hold_groups(self) -> bool:
        """Whether groups of experts go to nodes as wholes; otherwise any expert may go anywhere."""
        return self.nodes > 1 and self.groups > 1 and self.groups % self.nodes == 0


def place(load_SE: Integers, ep: int, nodes: Nodes, current: Order) -> Order:
    """A layer's experts by seat, for whom the measured load costs the least that was found.

    Never more than in the `current` order (unless that breaks groups apart), which is kept where nothing
    is better. The experts of a rank are in the order of their numbers.
    """
    num_experts = load_SE.shape[1]
    size = num_experts // ep
    node_E = np.zeros(num_experts, np.int64)
    now_E = np.empty(num_experts, np.int64)
    now_E[list(current)] = np.arange(num_experts) // size
    starts = [(now_E, node_E)]
    if nodes.hold_groups:
        group_E = np.arange(num_experts) // (num_experts // nodes.groups)
        load_SG = load_SE.reshape(len(load_SE), nodes.groups, -1).sum(2)
        alike = np.zeros(nodes.groups, np.int64)
        node_G = _improve(load_SG, _pack(load_SG, alike, nodes.nodes), alike)
        node_E = node_G[group_E]
        own_E = now_E // (ep // nodes.nodes)  # the nodes that they are on
        starts = (
            [(now_E, own_E)] if all(len(set(own_E[group_E == g])) == 1 for g in range(nodes.groups)) else []
        )
    starts.append((_pack(load_SE, node_E, ep), node_E))
    found = [_improve(load_SE, rank_E, own_E) for rank_E, own_E in starts]
    best_E = min(found, key=lambda rank_E: cost(load_SE, rank_E))  # of equal ones the first
    return tuple(int(expert) for expert in np.lexsort((np.arange(num_experts), best_E)))


def rank_rows(load_SE: Integers, order: Sequence[int], ep: int) -> Integers:
    """Rows that each rank's experts receive, [S, R]."""
    return load_SE[:, list(order)].reshape(len(load_SE), ep, -1).sum(2)


def cost(load_SE: Integers, bin_E: Integers) -> int:
    """The sum over steps of the fullest bin."""
    return int(_bins(load_SE, bin_E).max(1).sum())


def _bins(load_SE: Integers, bin_E: Integers) -> Integers:
    member_ER = (bin_E[:, None] == np.arange(bin_E.max() + 1)).astype(np.int64)
    return load_SE @ member_ER


def _pack(load_SE: Integers, node_E: Integers, num_bins: int) -> Integers:
    """The bin of each item: the heaviest first, to the lightest bin of its node with room left."""
    load_E = load_SE.sum(0)
    per_node, room = num_bins // (int(node_E.max()) + 1), len(load_E) // num_bins
    held, full = np.zeros(num_bins, np.int64), np.zeros(num_bins, np.int64)
    bin_E = np.empty(len(load_E), np.int64)
    for item in sorted(range(len(load_E)), key=lambda each: (-load_E[each], each)):
        first = int(node_E[item]) * per_node
        free = [each for each in range(first, first + per_node) if full[each] < room]
        bin_E[item] = chosen = min(free, key=held.__getitem__)
        held[chosen] += load_E[item]
        full[chosen] += 1
    return bin_E


def _improve(load_SE: Integers, bin_E: Integers, node_E: Integers) -> Integers:
    """Swap two items of a node as long as that lowers the cost, which only one of a fullest bin can."""
    bin_E = bin_E.copy()
    while True:
        full_SR = _bins(load_SE, bin_E)
        busiest = np.bincount(full_SR.argmax(1), minlength=full_SR.shape[1])
        for chosen in sorted(np.flatnonzero(busiest), key=lambda each: (-busiest[each], each)):
            swap = _best_swap(load_SE, bin_E, node_E, full_SR, int(chosen))
            if swap is not None:
                first, second = swap
                bin_E[[first, second]] = bin_E[[second, first]]
                break
        else:
            return bin_E


def _best_swap(
    load_SE: Integers, bin_E: Integers, node_E: Integers, full_SR: Integers, chosen: int
) -> tuple[int, int] | None:
    """The items, one of the chosen bin, whose swap lowers the cost the most; None where none does.

    A swap that helps does so in steps in which one of its two bins is the fullest. So only what helps where
    the chosen bin is need be weighed in all steps: the rest is found when the other bin is the chosen one.
    """
    mine = np.flatnonzero(bin_E == chosen)
    others_X = np.flatnonzero((bin_E != chosen) & (node_E == node_E[mine[0]]))
    rest_SR, is_fullest_S = _without(full_SR, chosen), full_SR.argmax(1) == chosen

    def gains(steps: NDArray[np.bool_], item: int, with_X: Integers) -> Integers:
        load, full, bin_X = load_SE[steps], full_SR[steps], bin_E[with_X]
        change_SX = load[:, with_X] - load[:, [item]]
        after_SX = np.maximum(full[:, [chosen]] + change_SX, full[:, bin_X] - change_SX)
        after_SX = np.maximum(after_SX, rest_SR[steps][:, bin_X])
        return np.asarray((full.max(1, keepdims=True) - after_SX).sum(0))

    most, swap = 0, None
    for item in mine.tolist():
        hopeful_X = others_X[gains(is_fullest_S, item, others_X) > 0]
        if len(hopeful_X):
            gain_X = gains(np.ones_like(is_fullest_S), item, hopeful_X)
            if gain_X.max() > most:
                most, swap = int(gain_X.max()), (item, int(hopeful_X[gain_X.argmax()]))
    return swap


def _without(full_SR: Integers, chosen: int) -> Integers:
    """The fullest of all bins but the chosen one and, in each column, that column's."""
    left_SR = full_SR.copy()
    left_SR[:, chosen] = 0
    top_S, steps = left_SR.argmax(1), np.arange(len(left_SR))
    first_S = left_SR[steps, top_S]
    left_SR[steps, top_S] = 0
    rest_SR = np.repeat(first_S[:, None], full_SR.shape[1], 1)
    rest_SR[steps, top_S] = left_SR.max(1)
    return rest_SR


def read_placement(path: Path, model: ModelConfig, ep: int) -> dict[str, Order]:
    """The order of each layer of experts that a file holds; UserError where it does not fit."""
    remedy = "make it with `switchyard place-experts` or set `layout.placement=null`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"`layout.placement` must be a file, but {path} cannot be read ({error.strerror}): {remedy}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"`layout.placement` must be a file of JSON, but {path} is none ({error}): {remedy}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("placement"), dict):
        raise UserError(f"`layout.placement` must hold `ep` and `placement`, but {path} does not: {remedy}")
    if content.get("ep") != ep:
        other = f"make it with `switchyard place-experts --ep {ep}` or " if ep > 1 else ""
        raise UserError(
            f"`layout.placement` must be made for `layout.ep={ep}`, but {path} is for {content.get('ep')}: "
            f"{other}set `layout.placement=null`"
        )
    layers, found = list(released_numbers(model).values()), content["placement"]
    if wrong := sorted(set(layers).symmetric_difference(found)):
        said = "names" if wrong[0] in found else "lacks"
        raise UserError(
            f"`layout.placement` must place the layers of experts of the model, but {path} {said} "
            f"{wrong[0]}: {remedy}"
        )
    return {layer: _permutation(path, layer, found[layer], model, remedy) for layer in layers}


def _permutation(path: Path, layer: str, seats: Any, model: ModelConfig, remedy: str) -> Order:
    experts = set(range(model.num_experts))
    whole = isinstance(seats, list) and all(type(expert) is int for expert in seats)
    if not whole or len(seats) != len(experts) or set(seats) != experts:
        raise UserError(
            f"`layout.placement` must give each of the {len(experts)} experts a seat, but layer {layer} of "
            f"{path} does not: {remedy}"
        )
    return tuple(seats)


def orders_of(config: RunConfig, ep: int) -> dict[str, Order]:
    """Which experts live where, by layer: as the settings say, otherwise chosen ones spread over the ranks.

    Empty where all layers are in order.
    """
    tune, path = config.tune, config.layout.placement
    selection = None
    if tune.method == "esft":
        assert tune.selection is not None, "rules.py asks for one"
        selection = read_selection(Path(tune.selection), config.model)
    if path is None:
        layers = list(released_numbers(config.model).values())
        return {} if selection is None else spread(selection, layers, config.model.num_experts, ep)
    found = read_placement(Path(path), config.model, ep)
    return found if selection is None else chosen_last(found, selection.experts, ep)


def chosen_last(
    orders: Mapping[str, Order], chosen: Mapping[str, Collection[int]], ep: int
) -> dict[str, Order]:
    """The same experts on each rank, those chosen to be trained in its last seats (see `Placement`)."""
    found = {}
    for layer, order in orders.items():
        size, last = len(order) // ep, chosen.get(layer, ())
        by_rank = (order[first : first + size] for first in range(0, len(order), size))
        found[layer] = tuple(e for own in by_rank for e in sorted(own, key=lambda each: each in last))
    return found
