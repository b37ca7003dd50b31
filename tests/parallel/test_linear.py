"""Products with weights: results, gradients, and where the weight gradient goes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.gradients import GradientBuffers, ParameterSet
from parallel.linear import GroupedLinear, Linear, linear

COUNTS = (3, 0, 2, 0)


def attach(*modules: torch.nn.Module) -> None:
    parameters = tuple(parameter for module in modules for parameter in module.parameters())
    GradientBuffers([ParameterSet(parameters, None, None)])


def filled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def loop(rows: Tensor, counts: tuple[int, ...], weight: Tensor) -> Tensor:
    """What a grouped product means, one expert after the other."""
    parts = rows.split(counts)
    return torch.cat([part @ weight[expert].t() for expert, part in enumerate(parts)])


def test_linear_is_the_plain_product() -> None:
    layer, rows = filled(Linear(4, 3)), torch.randn(2, 5, 4, requires_grad=True)
    upstream = torch.randn(2, 5, 3)
    ours = torch.autograd.grad(layer(rows), (rows, layer.weight), upstream)
    plain = torch.autograd.grad(F.linear(rows, layer.weight), (rows, layer.weight), upstream)
    assert torch.equal(layer(rows), F.linear(rows, layer.weight))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0, 0), (0, 0, 0, 5)])
def test_grouped_product_is_the_loop_over_experts(counts: tuple[int, ...]) -> None:
    layer, rows = filled(GroupedLinear(4, 0, 6, 3)), torch.randn(sum(counts), 6, requires_grad=True)
    upstream = torch.randn(sum(counts), 3)
    result, expected = layer(rows, counts), loop(rows, counts, layer.weight)
    torch.testing.assert_close(result, expected)
    ours = torch.autograd.grad(result, (rows, layer.weight), upstream)
    plain = torch.autograd.grad(expected, (rows, layer.weight), upstream)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not ours[1][[expert for expert in range(4) if not counts[expert]]].any()


@pytest.mark.parametrize("grouped", [False, True])
def test_main_grad_equals_grad_and_adds_up(grouped: bool) -> None:
    def layer() -> torch.nn.Module:
        return filled(GroupedLinear(4, 0, 6, 3) if grouped else Linear(6, 3))

    plain, buffered = layer(), layer()
    attach(buffered)
    for seed in range(3):
        torch.manual_seed(seed)
        rows, upstream = torch.randn(5, 6), torch.randn(5, 3)
        for module in (plain, buffered):
            (module(rows, COUNTS) if grouped else module(rows)).backward(upstream)
    assert buffered.weight.grad is None
    torch.testing.assert_close(buffered.weight.main_grad, plain.weight.grad)


@pytest.mark.parametrize("grouped", [False, True])
def test_bf16_weights_accumulate_in_fp32(grouped: bool) -> None:
    """One part in 512 is lost in every bf16 sum after the first; fp32 keeps them all."""
    layer = (
        GroupedLinear(1, 0, 1, 1, torch.bfloat16) if grouped else Linear(1, 1, torch.bfloat16)
    ).requires_grad_()
    attach(layer)
    for size in (1.0, *[2.0**-9] * 64):
        rows = torch.full((1, 1), size, dtype=torch.bfloat16)
        (layer(rows, (1,)) if grouped else layer(rows)).sum().backward()
    assert layer.weight.main_grad.dtype == torch.float32
    assert layer.weight.main_grad.item() == 1.0 + 64 * 2.0**-9


def test_what_needs_no_gradient_gets_none() -> None:
    layer, rows = filled(Linear(4, 3)), torch.randn(5, 4, requires_grad=True)
    attach(layer)
    layer(rows.detach()).sum().backward()
    assert layer.weight.main_grad.any()
    layer.weight.main_grad.zero_()
    layer.weight.requires_grad_(False)
    layer(rows).sum().backward()
    assert rows.grad is not None and not layer.weight.main_grad.any()
    grouped = filled(GroupedLinear(4, 0, 4, 3))
    attach(grouped)
    grouped.weight.requires_grad_(False)
    grouped(rows, COUNTS).sum().backward()
    assert not grouped.weight.main_grad.any()


def test_a_weight_that_is_no_parameter_passes_its_gradient_on() -> None:
    weight, rows = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear(rows, weight * 2).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * rows.sum(0).expand(3, 4))
