"""Checks of products with weights: plain and grouped, their weight gradients added into `main_grad`.

Legend: N rows, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn

from launch.bench.gpu import eighths
from launch.bench.gpu.ceilings import float32_products, grouped_mm
from launch.bench.gpu.exact import Found, leaf, normal, worst
from launch.bench.gpu.parts import Missing
from parallel.fp8 import Emulated
from parallel.linear import GroupedLinear, linear


def plain(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """A linear product [N, I] x [O, I], its input gradient, and the weight's onto a buffer that holds 1."""
    rows, weight = (
        normal(48 * size, 32 * size, dtype=dtype),
        normal(40 * size, 32 * size, dtype=dtype, seed=1),
    )
    grad = normal(48 * size, 40 * size, dtype=dtype, seed=2)
    held, weights = rows.to(device).requires_grad_(), nn.Parameter(weight.to(device))
    weights.main_grad = torch.ones_like(weights, dtype=torch.float32)  # type: ignore[attr-defined]
    with float32_products("highest"):
        out = linear(held, weights)
        out.backward(grad.to(device))
    exact_rows, exact_weight, exact_grad = rows.double(), weight.double(), grad.double()
    assert held.grad is not None
    return worst(
        {
            "output": (out, exact_rows @ exact_weight.T),
            "input gradient": (held.grad, exact_grad @ exact_weight),
            "weight gradient": (weights.main_grad, 1 + exact_grad.T @ exact_rows),  # type: ignore[attr-defined]
        }
    )


def grouped(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """The same of experts, one of which has no row and one a single one."""
    counts = (16 * size, 0, 1, 24 * size, 7 * size)
    layer = GroupedLinear(range(len(counts)), 32 * size, 24 * size, dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, dtype=dtype, seed=1))
    rows = normal(sum(counts), 32 * size, dtype=dtype)
    grad = normal(sum(counts), 24 * size, dtype=dtype, seed=2)
    exact_rows, exact_weight = leaf(rows), leaf(layer.weight)
    exact = by_expert(exact_rows, exact_weight, counts)
    exact.backward(grad.double())
    layer.to(device)
    layer.weight.main_grad = torch.ones_like(layer.weight, dtype=torch.float32)  # type: ignore[attr-defined]
    held = rows.to(device).requires_grad_()
    with float32_products("highest"):
        out = layer(held, counts)
        out.backward(grad.to(device))
    assert held.grad is not None and exact_rows.grad is not None and exact_weight.grad is not None
    return worst(
        {
            "output": (out, exact),
            "input gradient": (held.grad, exact_rows.grad),
            "weight gradient": (layer.weight.main_grad, 1 + exact_weight.grad),  # type: ignore[attr-defined]
        }
    )


def grouped_kernel(device: torch.device, size: int) -> Found:
    """torch's own grouped product in bf16, with an expert without rows."""
    if grouped_mm is None:
        raise Missing(f"torch {torch.__version__} has no grouped_mm")
    counts = (16 * size, 0, 24 * size, 8 * size)
    rows = normal(sum(counts), 32 * size, dtype=torch.bfloat16)
    weight = normal(len(counts), 24 * size, 32 * size, dtype=torch.bfloat16, seed=1)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    out = grouped_mm(rows.to(device), weight.to(device).mT, offs=ends)
    return worst({"output": (out, by_expert(rows.double(), weight.double(), counts))})


def eight_bits(device: torch.device, size: int) -> Found:
    """The three products in FP8 beside their emulation; blocks, and rows of experts, stand over."""
    backend = eighths.backend(device)
    counts = (16 * size, 0, 1, 24 * size, 7 * size)
    rows, grad = (normal(sum(counts), width * size, dtype=torch.bfloat16, seed=width) for width in (40, 27))
    weights = normal(len(counts), 27 * size, 40 * size, dtype=torch.bfloat16, seed=1)
    made = []
    for each, where in ((backend, device), (Emulated(), torch.device("cpu"))):
        held, upstream, stack = rows.to(where), grad.to(where), weights.to(where)
        target = torch.ones_like(stack, dtype=torch.float32)
        each.add_weight_gradient(target, upstream, each.keep(held, counts), counts)
        made.append(
            {
                "output": each.product(held, counts, stack),
                "input gradient": each.product_back(upstream, counts, stack),
                "weight gradient": target,
            }
        )
    found, exact = made
    return worst({name: (found[name], exact[name].double()) for name in found})


def by_expert(rows: Tensor, weights: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows [N, I] in expert order times weights [e, O, I]: [N, O]."""
    return torch.cat([part @ weight.T for part, weight in zip(rows.split(counts), weights, strict=True)])
