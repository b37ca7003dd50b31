"""Canonical names: every expert by itself, whatever the layout, as views that can be written."""

import copy

import pytest
import torch
from torch import nn

from parallel.linear import GroupedLinear, Linear
from parallel.shards import canonical, canonical_parameters, is_expert


class Experts(nn.Module):
    def __init__(self, num_local: int, first: int) -> None:
        super().__init__()
        self.down = GroupedLinear(num_local, first, 3, 2)


class Layer(nn.Module):
    def __init__(self, num_local: int, first: int) -> None:
        super().__init__()
        self.experts, self.gate = Experts(num_local, first), Linear(3, 4)


def model(num_local: int, first: int) -> nn.Module:
    return nn.ModuleDict({"layer": Layer(num_local, first)})


def test_names_know_no_layout() -> None:
    whole = {name for name, _ in canonical_parameters(model(4, 0))}
    parts = [{name for name, _ in canonical_parameters(model(2, first))} for first in (0, 2)]
    assert whole == parts[0] | parts[1]
    assert parts[0] & parts[1] == {"layer.gate.weight"}
    assert "layer.experts.3.down.weight" in parts[1]


def test_views_write_through() -> None:
    module = model(2, 2)
    for name, view in canonical_parameters(module):
        view.fill_(3.0 if name == "layer.experts.3.down.weight" else 0.0)
    assert module["layer"].experts.down.weight.sum((1, 2)).tolist() == [0.0, 18.0]


def test_tensors_shaped_like_a_parameter_are_cut_alike() -> None:
    weight = model(2, 4)["layer"].experts.down.weight
    moment = torch.arange(12.0).view(2, 2, 3)
    cut = dict(canonical("a.experts.b.experts.down.weight", weight, moment))
    assert list(cut) == [f"a.experts.b.experts.{expert}.down.weight" for expert in (4, 5)]
    assert torch.equal(cut["a.experts.b.experts.5.down.weight"], moment[1])


def test_casts_keep_the_names() -> None:
    module = model(2, 2)
    assert [is_expert(parameter) for parameter in module.parameters()] == [True, False]
    names = [name for name, _ in canonical_parameters(module)]
    assert [name for name, _ in canonical_parameters(module.to(torch.bfloat16))] == names


def test_deep_copies_keep_the_names() -> None:
    module = model(2, 2)
    names = [name for name, _ in canonical_parameters(module)]
    assert [name for name, _ in canonical_parameters(copy.deepcopy(module))] == names


def test_a_stack_needs_a_place_for_its_number() -> None:
    with pytest.raises(AssertionError, match="stacked by expert"):
        list(canonical("weight", model(2, 0)["layer"].experts.down.weight, torch.zeros(2, 2, 3)))
