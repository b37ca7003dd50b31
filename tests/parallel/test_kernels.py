"""Each kernel, interpreted, against its plain version; each plain version against what it means; and that
what is launched compiles for an H100."""

import importlib
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.interpreted import interpreted
from tests.ranks import CONTEXT

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(ours: Tensor, plain: Tensor) -> None:
    """One rounding apart: both reckon in fp32 and round at the end (the interpreter: towards 0)."""
    assert ours.dtype == plain.dtype
    tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@interpreted
def test_the_interpreter_runs_kernels() -> None:
    from parallel.kernels.where import by_kernel

    assert by_kernel(torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_rows_go_into_order_and_back(dtype: torch.dtype) -> None:
    from parallel.kernels import plain, rows

    source, index = random(7, 1100, dtype=dtype), torch.tensor([6, 0, 0, 3, 5])
    assert torch.equal(rows.permute(source, index), source[index])
    assert torch.equal(plain.permute(source, index), source[index])
    slots = torch.tensor([[0, 4, 2], [-1, -1, -1], [3, -1, 1]])
    moved = random(5, 1100, dtype=dtype)
    zero = moved.new_zeros(1100).float()
    expected = [[moved[n].float() if n >= 0 else zero for n in row] for row in slots.tolist()]
    summed = torch.stack([a + b + c for a, b, c in expected]).to(dtype)
    close(rows.unpermute(moved, slots), summed)
    close(plain.unpermute(moved, slots), summed)
    assert rows.unpermute(moved[:0], torch.full((2, 1), -1)).eq(0).all()
    assert rows.permute(source, index[:0]).shape == (0, 1100)


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_weighted_swiglu(dtype: torch.dtype) -> None:
    """Wider than a block; the last two rows do not count and hold what is no number."""
    from parallel.kernels import plain, swiglu

    gate_up, grad, weights = random(6, 2200, dtype=dtype), random(6, 1100, dtype=dtype), random(6)
    gate_up[4:] = grad[4:] = torch.nan
    end = torch.tensor([4], dtype=torch.int32)
    leaves = [gate_up[:4].double().requires_grad_(), weights[:4].double().requires_grad_()]
    gate, up = leaves[0].chunk(2, dim=1)
    exact = leaves[1][:, None] * F.silu(gate) * up
    exact_grads = torch.autograd.grad(exact, leaves, grad[:4].double())
    for module in (plain, swiglu):
        act = module.weighted_swiglu(gate_up, weights, end)[:4]
        close(act, exact.to(dtype))
        inputs, upstream = gate_up.clone(), grad.clone()
        grad_weights = module.weighted_swiglu_back(upstream, inputs, weights, end)
        close(upstream[:4], exact.to(dtype))
        close(inputs[:4], exact_grads[0].to(dtype))
        torch.testing.assert_close(grad_weights[:4], exact_grads[1].float(), rtol=1e-5, atol=1e-4)
        assert grad_weights.dtype == torch.float32 and not grad_weights[4:].any()


@pytest.mark.parametrize(
    ("dtype", "buffer", "by_index"),
    [
        (torch.float32, torch.float32, "neither"),
        (torch.bfloat16, torch.float32, "rows"),
        (torch.bfloat16, torch.bfloat16, "grad"),
    ],
)
@interpreted
def test_weight_gradients_add_up(dtype: torch.dtype, buffer: torch.dtype, by_index: str) -> None:
    """More rows than a block holds, tiles that stand over, experts without rows, rows that no expert has."""
    from parallel.kernels import plain
    from parallel.kernels.weight_gradient import add_weight_gradients

    offsets = torch.tensor([0, 0, 70, 70, 75], dtype=torch.int32)
    index = torch.arange(80) % 9
    grad = random(9 if by_index == "grad" else 80, 136, dtype=dtype)
    rows = random(9 if by_index == "rows" else 80, 24, dtype=dtype)
    indices = (index if by_index == "grad" else None, index if by_index == "rows" else None)
    before = random(4, 136, 24, dtype=buffer)
    ours, reference = before.clone(), before.clone()
    add_weight_gradients(ours, grad, rows, offsets, *indices)
    plain.add_weight_gradients(reference, grad, rows, offsets, *indices)
    expected = before.double()
    grads, inputs = (
        (each if i is None else each[i]).double() for each, i in zip((grad, rows), indices, strict=True)
    )
    expected[1] += grads[:70].t() @ inputs[:70]
    expected[3] += grads[70:75].t() @ inputs[70:75]
    tolerance = 4e-2 if buffer == torch.bfloat16 else 2e-5
    for result in (ours, reference):
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[[0, 2]], before[[0, 2]])


GATES = [(6, 1, 1, 1, 64), (3, 4, 2, 2, 16), (5, 4, 3, 1, 20), (8, 8, 4, 2, 256)]


@pytest.mark.parametrize(("top_k", "groups", "kept", "best", "experts"), GATES)
@interpreted
def test_top_k_within_groups(top_k: int, groups: int, kept: int, best: int, experts: int) -> None:
    """Of scores with many ties, against one token at a time; below zero, where 0 is no stand-in for none."""
    from parallel.kernels import plain
    from parallel.kernels.top_k import top_k_in_groups

    choice = random(37, experts).mul(2).round() / 2 - 3
    choice[5] = -3.0
    expected, width = [], experts // groups
    for row in choice.tolist():
        parts = [sorted(row[g * width : (g + 1) * width], reverse=True)[:best] for g in range(groups)]
        sums = [-sum(part) for part in parts]
        chosen = sorted(range(groups), key=sums.__getitem__)[:kept]
        candidates = [e for e in range(experts) if e // width in chosen]
        expected.append(sorted(candidates, key=row.__getitem__, reverse=True)[:top_k])
    assert expected[5] == list(range(top_k))
    for function in (top_k_in_groups, plain.top_k_in_groups):
        found = function(choice, top_k, groups, kept, best)
        assert found.dtype == torch.int64 and found.tolist() == expected
        lost = function(torch.full((2, experts), torch.nan), top_k, groups, kept, best)
        assert lost.min() >= 0 and lost.max() < experts


@interpreted
def test_the_router_chooses_by_the_kernel_on_cuda() -> None:
    from moe.config import BalanceConfig, ModelConfig
    from moe.model.router import Router
    from parallel.kernels import top_k

    config = ModelConfig(num_experts=16, num_groups=4, top_groups=2, top_k=3)
    router, choice = Router(config, BalanceConfig()), random(9, 16)
    expected, calls = router.choose(choice).sort(-1).values, []
    patch = pytest.MonkeyPatch()
    launched = top_k.top_k_in_groups
    patch.setattr(top_k, "top_k_in_groups", lambda *args: calls.append(args) or launched(*args))
    patch.setattr(torch.Tensor, "is_cuda", True)
    with patch.context():
        found = router.choose(choice)
    patch.undo()
    assert torch.equal(found.sort(-1).values, expected) and len(calls) == 1


def test_what_is_launched_compiles_for_an_h100(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not, for which a driver that names an H100 is enough."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as process:
        compiled = process.submit(_compile, tmp_path).result()
    assert set(compiled) == {"_permute", "_unpermute", "_forward", "_backward", "_add", "_choose"}
    assert "wgmma" in compiled["_add"]  # tensor cores, not plain products


def _compile(cache: Path) -> dict[str, str]:
    """The PTX of every kernel, by its name."""
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class H100:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    found, run = {}, JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        found[self.fn.__name__] = run(self, *args, warmup=True, **options).asm["ptx"]

    driver.set_active(H100())
    JITFunction.run = compile_only
    rows, swiglu, top_k, weight_gradient = (
        importlib.import_module(f"parallel.kernels.{name}")
        for name in ("rows", "swiglu", "top_k", "weight_gradient")
    )
    for module in (rows, swiglu, top_k, weight_gradient):
        module.by_kernel = lambda tensor: True
    index, ends = torch.arange(8), torch.tensor([0, 8], dtype=torch.int32)
    act = rows.unpermute(rows.permute(random(8, 64, dtype=torch.bfloat16), index), index[:, None])
    swiglu.weighted_swiglu(act, random(8), ends[1:])
    swiglu.weighted_swiglu_back(act[:, :32].contiguous(), act, random(8), ends[1:])
    weight_gradient.add_weight_gradients(random(1, 64, 64), act, act, ends, None, index)
    top_k.top_k_in_groups(random(8, 16), 3, 4, 2, 2)
    return found
