"""SwiGLU and its backward in every form, against autograd over the plain formula in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import activation
from parallel.activation import TILED, Activation, backward_by_kernel, forward_by_kernel, swiglu
from tests.interpreted import interpreted

ROWS, WIDTH = 9, 6


def uncompiled(patch: pytest.MonkeyPatch) -> Activation:
    """The functions that are given to the compiler, as they are: compiling takes ten seconds."""
    patch.setattr(activation, "_compiler", lambda function: function)
    return Activation(compiled=True)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    gate_up, weights = torch.randn(ROWS, 2 * WIDTH).to(dtype), torch.rand(ROWS)
    return gate_up.requires_grad_(), weights.requires_grad_(), torch.randn(ROWS, WIDTH).to(dtype)


def expected(gate_up: Tensor, weights: Tensor, grad: Tensor, weighed: bool) -> list[Tensor]:
    """Activation, gradient of the product, gradient of the weights."""
    wide = gate_up.detach().double().requires_grad_()
    each = weights.detach().double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    made = F.silu(gate) * up * (each[:, None] if weighed else 1)
    made.backward(grad.double())
    return [made.detach(), wide.grad] + ([each.grad] if weighed else [])


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, wanted, strict=True):
        limit = 1e-6 if one.dtype == torch.float32 else 4e-3
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["tiles", "one tile", "compiled"])
def test_it_is_the_formula(
    form: str, dtype: torch.dtype, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    by = uncompiled(monkeypatch) if form == "compiled" else TILED
    monkeypatch.setattr(activation, "_TILE", 4 * WIDTH if form == "tiles" else 2**18)
    gate_up, weights, grad = inputs(dtype)
    made = swiglu(gate_up, weights if weighed else None, by)
    made.backward(grad)
    found = [made.detach(), gate_up.grad] + ([weights.grad] if weighed else [])
    close(found, expected(gate_up, weights, grad, weighed), dtype)


@pytest.mark.parametrize("form", ["tiles", "compiled"])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_backward_makes_the_activation_again(
    form: str, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    by = uncompiled(monkeypatch) if form == "compiled" else TILED
    gate_up, weights, grad = (part.detach() for part in inputs(torch.float32))
    again, of_weights = torch.empty(ROWS, WIDTH), torch.empty(ROWS) if weighed else None
    by.backward(gate_up, grad, torch.empty_like(gate_up), weights if weighed else None, of_weights, again)
    torch.testing.assert_close(again, swiglu(gate_up, weights if weighed else None))


@pytest.mark.parametrize("weighed", [False, True])
@interpreted
def test_so_is_cudas_kernel(weighed: bool) -> None:
    gate_up, weights, grad = (part.detach() for part in inputs(torch.float32))
    given = weights if weighed else None
    product, of_weights = backward_by_kernel(gate_up, grad, given)
    found = [forward_by_kernel(gate_up, given), product, *([of_weights] if of_weights is not None else [])]
    close(found, expected(gate_up, weights, grad, weighed), torch.float32)
