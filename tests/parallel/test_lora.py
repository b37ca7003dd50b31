"""An adapter is what autograd makes of a weight W + scale x up down, and its base gets no gradient."""

import copy

import pytest
import torch
from torch import Tensor, nn

from parallel.groups import single
from parallel.linear import GroupedLinear, Linear, Queue, deferring
from parallel.lora import attach
from parallel.shards import Cut, is_expert, parameter_pieces
from tests.reduced import buffers

INPUTS, OUTPUTS, RANK, SCALE, COUNTS = 6, 8, 3, 0.7, (3, 0, 2, 1)


def adapted(grouped: bool) -> nn.Module:
    layer = GroupedLinear(range(len(COUNTS)), INPUTS, OUTPUTS) if grouped else Linear(INPUTS, OUTPUTS)
    attach(layer, RANK, SCALE)
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def run(layer: nn.Module, rows: Tensor, grouped: bool) -> Tensor:
    result: Tensor = layer(rows, COUNTS) if grouped else layer(rows)
    return result


def reference(layer: nn.Module, rows: Tensor, grouped: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The same through one weight, written out."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    whole = leaves["weight"] + SCALE * leaves["lora.up.weight"] @ leaves["lora.down.weight"]
    if not grouped:
        return rows @ whole.mT, leaves
    return torch.cat([part @ whole[e].mT for e, part in enumerate(rows.split(COUNTS))]), leaves


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("how", ["grad", "main_grad", "deferred"])
def test_equals_the_written_out_weight(grouped: bool, how: str) -> None:
    layer, rows, upstream = (
        adapted(grouped),
        torch.randn(6, INPUTS, requires_grad=True),
        torch.randn(6, OUTPUTS),
    )
    if how != "grad":
        buffers(layer, single())
    queue = Queue()
    if how == "deferred":
        with deferring(queue):
            made = run(layer, rows, grouped)
    else:
        made = run(layer, rows, grouped)
    made.backward(upstream)
    assert len(queue) == (2 if how == "deferred" else 0)  # none for the frozen weight
    while queue:
        queue.popleft()()
    grad_rows, rows.grad = rows.grad, None
    wanted, leaves = reference(layer, rows, grouped)
    wanted.backward(upstream)
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(grad_rows, rows.grad)
    assert layer.weight.grad is None and not hasattr(layer.weight, "main_grad")
    for name in ("lora.down.weight", "lora.up.weight"):
        parameter = layer.get_parameter(name)
        found = parameter.grad if how == "grad" else parameter.main_grad
        torch.testing.assert_close(found, leaves[name].grad)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_frozen_product_keeps_no_rows(grouped: bool) -> None:
    layer, rows = adapted(grouped), torch.randn(6, INPUTS, requires_grad=True)
    layer.lora = None
    assert run(layer, rows, grouped).grad_fn.saved_tensors == ()
    layer.weight.requires_grad_(True)
    assert len(run(layer, rows, grouped).grad_fn.saved_tensors) == 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("dim", "sections"), [(0, 2), (1, 1)])
def test_parts_are_cut_as_the_weight_is(grouped: bool, dim: int, sections: int) -> None:
    """The half that meets the cut is a part, the other is whole."""
    cut = Cut(dim=dim, index=1, count=2, sections=sections)
    layer = (
        GroupedLinear(range(4, 8), INPUTS, OUTPUTS, cut=cut) if grouped else Linear(INPUTS, OUTPUTS, cut=cut)
    )
    attach(layer, RANK, SCALE)
    held = {piece.name: piece for piece in parameter_pieces(nn.ModuleDict({"experts": layer}))}
    first = "experts.4" if grouped else "experts"
    down, up = held[f"{first}.lora.down.weight"], held[f"{first}.lora.up.weight"]
    assert (down.shape, up.shape) == ((RANK, INPUTS), (OUTPUTS, RANK))
    weight = held[f"{first}.weight"]
    assert (up if dim == 0 else down).offset == weight.offset != (0, 0)
    assert (down if dim == 0 else up).tensor.shape == (down if dim == 0 else up).shape
    copied = copy.deepcopy(layer)
    assert all(is_expert(parameter) == grouped for parameter in copied.parameters())
