"""The experts path of CUDA, its kernels interpreted, against one expert after the other through autograd."""

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.errors import UserError
from parallel.linear import Queue, deferring
from tests.interpreted import interpreted

HIDDEN, WIDTH = 16, 24
FP32, BF16 = torch.float32, torch.bfloat16


def order_of(experts_SK: Tensor, num_experts: int):  # type: ignore[no-untyped-def]
    """Source row of each row, the row of each slot, and counts; `num_experts` stands for no expert."""
    from parallel.grouped import Order

    flat = experts_SK.flatten()
    counts = torch.bincount(flat, minlength=num_experts + 1)[:-1]
    index = flat.argsort(stable=True)  # rows of no expert are the last and have no slot
    slots = torch.full_like(flat, -1)
    slots[index[: counts.sum()]] = torch.arange(int(counts.sum()))
    return Order(index // experts_SK.shape[1], slots.view_as(experts_SK)), counts


def reference(
    source: Tensor, weights_N: Tensor, index_N: Tensor, counts: Sequence[int], gate_up: Tensor, down: Tensor
) -> Tensor:
    """The same sum in fp64, plainly."""
    out, begin = source * 0, 0
    for expert, count in enumerate(counts):
        for n in range(begin, begin + count):
            gate, up = (gate_up[expert] @ source[index_N[n]]).chunk(2)
            row = weights_N[n] * (down[expert] @ (F.silu(gate) * up))
            out = out.index_add(0, index_N[n : n + 1], row[None])
        begin += count
    return out


def stacks(num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    gate_up = torch.randn(num_experts, 2 * WIDTH, HIDDEN).to(dtype) / 4
    return gate_up, torch.randn(num_experts, HIDDEN, WIDTH).to(dtype) / 4


def close(ours: Tensor | None, exact: Tensor, dtype: torch.dtype = FP32) -> None:
    """To within what products of `dtype` allow."""
    assert ours is not None
    tolerance = 3e-2 * exact.abs().max().item() if dtype == BF16 else 2e-5
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)


# Experts of each source row; 4 where there is none.
ONE = torch.tensor([[3], [4], [0], [0], [3]])
SIX = torch.tensor([[0, 1, 2, 3, 4, 4], [3, 3, 0, 0, 1, 1], [4] * 6, [1, 0, 3, 4, 1, 0]])
TWO = torch.tensor([[1, 3], [3, 1], [1, 4]])  # experts 0 and 2 have no rows
NONE = torch.full((2, 3), 4)


@pytest.mark.parametrize(
    ("experts", "dtype", "buffer", "on_device"),
    [
        pytest.param(ONE, FP32, None, True, id="one-slot"),
        pytest.param(SIX, FP32, FP32, True, id="six-slots"),
        pytest.param(SIX, BF16, FP32, False, id="bf16"),
        pytest.param(TWO, BF16, BF16, True, id="bf16-buffers"),
        pytest.param(TWO, FP32, None, False, id="empty-experts"),
        pytest.param(NONE, FP32, FP32, True, id="no-rows"),
    ],
)
@interpreted
def test_outputs_and_gradients(
    experts: Tensor, dtype: torch.dtype, buffer: torch.dtype | None, on_device: bool
) -> None:
    """Counts on the host cover every row; on the device rows beyond them may hold what is no number."""
    from parallel.grouped_cuda import gated_experts

    order, counts = order_of(experts, 4)
    num_rows = int(counts.sum())
    index = order.index_N[:num_rows]
    if not on_device:
        order = type(order)(index, order.slot_SK)
    source = torch.randn(len(experts), HIDDEN).to(dtype).requires_grad_()
    weights = torch.rand(len(order.index_N)).requires_grad_()
    with torch.no_grad():
        weights[num_rows:] = torch.nan
    gate_up, down = (weight.requires_grad_() for weight in stacks(4, dtype))
    before = {}
    for weight in (gate_up, down) if buffer else ():
        before[weight] = torch.randn(weight.shape).to(buffer)
        weight.main_grad = before[weight].clone()
    given = counts if on_device else tuple(counts.tolist())
    out = gated_experts(source, weights, order, given, (gate_up,), (down,))
    assert out.dtype == dtype
    upstream = torch.randn(HIDDEN).to(dtype).expand(out.shape)  # as the gradient of a sum is
    out.backward(upstream)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (source, weights, gate_up, down)]
    exact = reference(*leaves[:2], index, counts.tolist(), *leaves[2:])
    exact_grads = torch.autograd.grad(exact, leaves, upstream.double(), materialize_grads=True)
    close(out.detach(), exact.detach(), dtype)
    for leaf, expected in zip((source, weights, gate_up, down), exact_grads, strict=True):
        if leaf in before:
            assert leaf.grad is None
            close(leaf.main_grad.double() - before[leaf].double(), expected, dtype)
        else:
            assert leaf.grad.dtype == leaf.dtype
            close(leaf.grad, expected, dtype)
    if buffer:
        assert torch.equal(gate_up.main_grad[counts == 0], before[gate_up][counts == 0])


@pytest.mark.parametrize("later", [False, True])
@interpreted
def test_two_stacks_in_order_and_deferred(later: bool) -> None:
    """Rows lie in expert order; of two stacks the second alone is trained, and the first may be empty."""
    from parallel.grouped import Order
    from parallel.grouped_cuda import gated_experts

    counts, order = (2, 0, 3, 1), Order(None, torch.arange(6)[:, None])
    source, weights, upstream = torch.randn(6, HIDDEN), torch.rand(6), torch.randn(HIDDEN).expand(6, -1)
    whole = stacks(4, FP32)
    leaves = [leaf.double().requires_grad_() for leaf in (source, weights, *whole)]
    exact = reference(*leaves[:2], torch.arange(6), counts, *leaves[2:])
    exact_grads = torch.autograd.grad(exact, leaves, upstream.double())
    for num_rest in (0, 1, 2):
        parts = [(weight[:num_rest].clone(), weight[num_rest:].clone()) for weight in whole]
        queue = Queue()
        for _, chosen in parts:
            chosen.requires_grad_().main_grad = torch.zeros_like(chosen)
        leaf = source.clone().requires_grad_()
        with deferring(queue) if later else nullcontext():
            out = gated_experts(leaf, weights, order, counts, *parts)
        out.backward(upstream)
        assert len(queue) == 2 * later
        if later:
            assert not any(chosen.main_grad.any() for _, chosen in parts)
        while queue:
            queue.popleft()()
        close(out.detach(), exact.detach())
        close(leaf.grad, exact_grads[0])
        for (rest, chosen), expected in zip(parts, exact_grads[2:], strict=True):
            assert rest.grad is None and chosen.grad is None
            close(chosen.main_grad, expected[num_rest:])


@interpreted
def test_only_what_needs_a_gradient_gets_one_and_a_backward_runs_once() -> None:
    from parallel.grouped_cuda import gated_experts

    order, counts = order_of(TWO, 4)
    source, weights, (gate_up, down) = torch.randn(3, HIDDEN), torch.rand(6).requires_grad_(), stacks(4, FP32)
    down.requires_grad_()
    out = gated_experts(source, weights, order, counts, (gate_up,), (down,))
    out.backward(torch.ones_like(out), retain_graph=True)
    assert source.grad is None and gate_up.grad is None
    assert weights.grad is not None and down.grad is not None and down.grad[[1, 3]].any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))
    with pytest.raises(AssertionError, match="3 counts for 4 experts"):
        gated_experts(source, weights, order, (1, 2, 3), (gate_up,), (down,))
    with pytest.raises(UserError, match="multiples of 4 on a GPU, but are 15 and 24: "):
        gated_experts(source[:, :15], weights, order, counts, (gate_up,), (down,))
