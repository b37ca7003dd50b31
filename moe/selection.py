"""Which experts of which layers a fine-tuning trains (ESFT, arXiv 2407.01906), and on which ranks. No torch.

The file is DeepSeek's published format, `expert_cfg.json` in the folder of an adapter:

    {"experts": {"1": [8, 26, 55], ...}, "shared_experts": false, "non_expert_modules": false}

Layers are numbered as in a released model: MTP modules come after the last one. A layer that is left out
trains nothing. With `non_expert_modules` all is trained that is no expert, routers too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from moe.components import component_of
from moe.config import ModelConfig
from parallel.errors import UserError

FILE = "expert_cfg.json"
_ROUNDING = 1e-9  # of a sum of scores


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen experts by the layer's name ("3", "mtp0"), and whether what is no routed expert is too."""

    experts: Mapping[str, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    def trains(self, name: str) -> bool:
        """Whether the tensor of a canonical name is trained."""
        component = component_of(name)
        if component == "experts":
            kind, number, *_ = name.split(".")
            layer = number if kind == "layers" else f"{kind}{number}"
            expert = int(name.split("experts.")[1].split(".")[0])
            return expert in self.experts.get(layer, ())
        return self.shared_experts if component == "shared" else self.non_expert_modules


def read_selection(path: Path, model: ModelConfig) -> Selection:
    """The selection that a file holds; UserError where it does not fit the model or chooses nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"a selection of experts must be a file, but {path} cannot be read ({error.strerror}): make it "
            "with `switchyard select-experts`"
        ) from None
    except ValueError as error:
        raise _malformed(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("experts"), dict):
        raise _malformed(path, "it has no `experts` by layer")
    flags = {key: content.get(key, False) for key in ("shared_experts", "non_expert_modules")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise _malformed(path, f"`{key}` is {value!r}, neither true nor false")
    experts = dict(_checked(path, content["experts"], model))
    if not any(experts.values()) and not any(flags.values()):
        raise UserError(f"{path} must choose something to train, but chooses nothing: name an expert in it")
    return Selection(experts=experts, **flags)


def _checked(
    path: Path, experts: Mapping[str, Any], model: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = released_numbers(model)
    for number, chosen in experts.items():
        if number not in names:
            some = f"{min(names, key=int)} to {max(names, key=int)}" if names else "none"
            raise UserError(
                f"{path} must choose from layers of experts, which are {some}, but names layer {number}: "
                "remove it or use the selection of this model"
            )
        if not isinstance(chosen, list) or not all(type(expert) is int for expert in chosen):
            raise _malformed(path, f"layer {number} is no list of experts' numbers")
        for expert in chosen:
            if not 0 <= expert < model.num_experts:
                raise UserError(
                    f"{path} must choose experts from 0 to {model.num_experts - 1}, but names {expert} in "
                    f"layer {number}: remove it or use the selection of this model"
                )
        if len(set(chosen)) < len(chosen):
            raise _malformed(path, f"layer {number} names an expert twice")
        yield names[number], tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of every expert, by the layer's name; `tokens` that they were taken over.

    Over N tokens the token score of an expert is (1 / N K) times how often it was chosen, its gate score
    (1 / N) times the sum of its gate weights, 0 where it was not chosen (section 3.2). The weights are those
    of the router's scores, without what it multiplies them with (`gate_scale`): thresholds mean the same for
    every model. `gate` is empty where it is not known.
    """

    token: Mapping[str, Sequence[float]]
    gate: Mapping[str, Sequence[float]]
    tokens: int


def gate_scale(model: ModelConfig) -> float:
    """What a router multiplies its weights with (router.py)."""
    scales = model.score_function == "sigmoid" or not model.normalize_top_k
    return model.routed_scaling_factor if scales else 1.0


def released_numbers(model: ModelConfig) -> dict[str, str]:
    """A released model's number of each layer of experts, and the name that its load goes under."""
    own = {str(layer): str(layer) for layer in range(model.num_layers) if model.is_moe(layer)}
    mtp = {str(model.num_layers + index): f"mtp{index}" for index in range(model.num_mtp_layers)}
    return own | mtp


def _malformed(path: Path, why: str) -> UserError:
    return UserError(f"{path} must be a selection of experts, but {why}: mend it or make it anew")


def as_json(selection: Selection, model: ModelConfig) -> dict[str, Any]:
    """What a file of this selection holds: every layer of experts, chosen from or not."""
    names = released_numbers(model)
    return {
        "experts": {number: list(selection.experts.get(name, ())) for number, name in names.items()},
        "shared_experts": selection.shared_experts,
        "non_expert_modules": selection.non_expert_modules,
    }


def shortest_prefix(scores: Sequence[float], threshold: float) -> tuple[int, ...]:
    """The fewest experts of greatest score whose scores add up to the threshold, the greatest first.

    Of equal scores the smaller number comes first. All experts where even their sum is less.
    """
    by_score = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
    chosen: list[int] = []
    for expert in by_score:
        if fsum(scores[each] for each in chosen) >= threshold - _ROUNDING:
            break
        chosen.append(expert)
    return tuple(chosen)


def spread(
    selection: Selection, layers: Sequence[str], num_experts: int, ep: int
) -> dict[str, tuple[int, ...]]:
    """The expert in each seat of every layer (see `Placement`): the chosen ones dealt out to the ranks.

    They are dealt in the order of layers and numbers, one to each rank in turn and on from layer to layer.
    So the ranks' numbers of chosen experts differ by at most 1, in a layer and over any consecutive layers:
    also on every stage of a pipeline. The others fill the seats before them in order.
    """
    dealt, orders = 0, {}
    for layer in layers:
        chosen: list[list[int]] = [[] for _ in range(ep)]
        for expert in sorted(selection.experts.get(layer, ())):
            chosen[dealt % ep].append(expert)
            dealt += 1
        rest = iter(sorted(set(range(num_experts)).difference(*chosen)))
        orders[layer] = tuple(
            expert
            for own in chosen
            for expert in (*(next(rest) for _ in range(num_experts // ep - len(own))), *own)
        )
    return orders
