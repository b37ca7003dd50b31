"""Canonical names: every expert by itself, whatever the layout, as views that can be written."""

import copy

import pytest
import torch
from torch import Tensor, nn

from parallel.linear import GroupedLinear, Linear
from parallel.shards import (
    Cut,
    Piece,
    is_expert,
    parameter_pieces,
    pieces,
)
from tests.reduced import canonical, canonical_parameters


class Experts(nn.Module):
    def __init__(self, num_local: int, first: int) -> None:
        super().__init__()
        self.down = GroupedLinear(range(first, first + num_local), 3, 2)


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


class Cutting(nn.Module):
    """A gate-and-up product cut by outputs, a product cut by inputs, and the same for two experts."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        halves, inputs = Cut(0, index, count, sections=2), Cut(1, index, count)
        self.up, self.down = Linear(3, 8, cut=halves), Linear(4, 3, cut=inputs)
        self.experts = nn.Module()
        self.experts.up = GroupedLinear((6, 7), 3, 8, cut=halves)
        self.experts.down = GroupedLinear((6, 7), 4, 3, cut=inputs)


SHAPES = {"up.weight": (8, 3), "down.weight": (3, 4)}
SHAPES |= {f"experts.{expert}.{name}": shape for expert in (6, 7) for name, shape in SHAPES.items()}


def numbered(name: str) -> Tensor:
    shape = SHAPES[name]
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_pieces_of_all_ranks_tile_the_canonical_tensors(count: int) -> None:
    found = {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()}
    for index in range(count):
        for piece in parameter_pieces(Cutting(index, count)):
            assert piece.shape == SHAPES[piece.name]
            assert (found[piece.name][piece.place] == -1).all()  # nobody else's
            found[piece.name][piece.place] = index
    assert all((tensor >= 0).all() for tensor in found.values())
    if count == 2:  # gate rows 0-3 and up rows 4-7: each rank has half of both
        assert found["up.weight"][:, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
        assert found["down.weight"][0].tolist() == [0, 0, 1, 1]


def test_a_part_computes_what_its_place_says() -> None:
    """Filled from canonical tensors, the parts of SwiGLU's first product are the same units' gate and up."""
    module = Cutting(1, 2)
    with torch.no_grad():
        for piece in parameter_pieces(module):
            piece.tensor.copy_(numbered(piece.name)[piece.place])
    assert torch.equal(module.up.weight, numbered("up.weight")[[2, 3, 6, 7]])
    assert torch.equal(module.experts.down.weight[1], numbered("experts.7.down.weight")[:, 2:])


@pytest.mark.parametrize("step", [1, 5, 7, 24, 100])
def test_flat_ranges_are_rectangles(step: int) -> None:
    """Any stretch of a parameter's memory, as ZeRO cuts it, lands where the whole parameter does."""
    module = Cutting(1, 2)
    for name, parameter in module.named_parameters():
        expected = {
            (p.name, p.offset): p.tensor for p in pieces(name, parameter, parameter.detach().view(-1))
        }
        whole = {piece[0]: torch.full(SHAPES[piece[0]], torch.nan) for piece in expected}
        for (full_name, offset), tensor in expected.items():
            whole[full_name][Piece(full_name, (), offset, tensor).place] = tensor
        found = {full_name: torch.full_like(tensor, torch.nan) for full_name, tensor in whole.items()}
        flat = parameter.detach().view(-1)
        for begin in range(0, len(flat), step):
            for piece in pieces(name, parameter, flat[begin : begin + step], begin):
                assert found[piece.name][piece.place].isnan().all()
                found[piece.name][piece.place] = piece.tensor
        for full_name, tensor in whole.items():
            assert torch.equal(found[full_name].nan_to_num(-1), tensor.nan_to_num(-1))


def test_pieces_are_views() -> None:
    module = Cutting(0, 2)
    for name, parameter in module.named_parameters():
        flat = parameter.detach().view(-1)
        for piece in pieces(name, parameter, flat[3:9], 3):
            piece.tensor.fill_(7.0)
        assert (flat[3:9] == 7).all() and not (flat[:3] == 7).any()


def test_a_cut_tensor_is_not_taken_for_a_whole_one() -> None:
    module = Cutting(0, 2)
    with pytest.raises(AssertionError, match="is cut"):
        list(canonical_parameters(module))
