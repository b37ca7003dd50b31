"""The experts of a rank as one function, against a loop over rows in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import grouped
from parallel.grouped import IN_ORDER, Order, gated_experts, sum_rows, take_rows
from parallel.linear import Queue, deferring

SOURCES, SLOTS, EXPERTS, HIDDEN, WIDTH = 12, 3, 5, 8, 6


def rows_of(experts_SK: Tensor) -> tuple[Order, tuple[int, ...], Tensor]:
    """The order of chosen experts (EXPERTS: none), rows for each, and which choice each row is."""
    flat = experts_SK.flatten()
    counts = torch.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS]
    chosen_N = flat.argsort(stable=True)[: int(counts.sum())]
    slots = torch.full_like(flat, -1)
    slots[chosen_N] = torch.arange(len(chosen_N))
    order = Order(chosen_N // experts_SK.shape[1], slots.view_as(experts_SK))
    return order, tuple(counts.tolist()), chosen_N


def choices(kind: str) -> Tensor:
    """Distinct experts [S, K]; the last expert gets no row."""
    torch.manual_seed(1)
    chosen = torch.rand(SOURCES, EXPERTS - 1).topk(SLOTS).indices
    if kind == "padded":
        chosen[::4] = EXPERTS
        chosen[1, 0] = EXPERTS
    return chosen


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Source, gate weights [S, K], gate_up and down of all experts, and a gradient."""
    torch.manual_seed(0)
    shapes = (SOURCES, HIDDEN), (SOURCES, SLOTS), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    source, weights, gate_up, down = (torch.randn(shape) for shape in shapes)
    made = source.to(dtype), weights.sigmoid(), gate_up.to(dtype), down.to(dtype)
    return *(each.requires_grad_() for each in made), torch.randn(SOURCES, HIDDEN).to(dtype)


def by_hand(experts_SK: Tensor, *given: Tensor) -> list[Tensor]:
    """The output and every gradient, row by row."""
    *leaves, grad = (each.detach().double() for each in given)
    source, weights, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    out = []
    for s, chosen in enumerate(experts_SK.tolist()):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for k, expert in enumerate(chosen):
            if expert < EXPERTS:
                gate, up = (gate_up[expert] @ source[s]).chunk(2)
                total = total + weights[s, k] * (down[expert] @ (F.silu(gate) * up))
        out.append(total)
    stacked = torch.stack(out)
    stacked.backward(grad)
    return [stacked.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("rows", [1, 7, 1000], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "padded"])
def test_it_is_every_rows_expert(
    kind: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_ROWS", rows)
    chosen, (source, weights, gate_up, down, grad) = choices(kind), tensors(dtype)
    order, counts, chosen_N = rows_of(chosen)
    out = gated_experts(source, weights.flatten()[chosen_N], order, counts, (gate_up,), (down,))
    out.backward(grad)
    found = [out.detach(), *(each.grad for each in (source, weights, gate_up, down))]
    assert_close(
        found,
        by_hand(chosen, source, weights, gate_up, down, grad),
        1e-6 if dtype == torch.float32 else 2e-2,
    )


def test_rows_in_order_need_no_index() -> None:
    source, weights, gate_up, down, grad = tensors()
    counts = (4, 0, 5, 3, 0)
    experts = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))[:, None]
    out = gated_experts(source, weights[:, 0], IN_ORDER, counts, (gate_up,), (down,))
    out.backward(grad)
    found = [out.detach(), *(each.grad for each in (source, gate_up, down))]
    wanted = by_hand(experts, source, weights[:, :1], gate_up, down, grad)
    assert_close(found, [wanted[0], wanted[1], *wanted[3:]], 1e-6)
    assert_close([weights.grad[:, :1]], [wanted[2]], 1e-6)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_two_stacks_are_one_and_a_frozen_one_gets_no_gradient(first: int) -> None:
    chosen, (source, weights, gate_up, down, grad) = choices("all"), tensors()
    order, counts, chosen_N = rows_of(chosen)
    parts = [(stack[:first].detach(), stack[first:].detach().requires_grad_()) for stack in (gate_up, down)]
    out = gated_experts(source, weights.flatten()[chosen_N], order, counts, *parts)
    out.backward(grad)
    wanted = by_hand(chosen, source, weights, gate_up, down, grad)
    found = [out.detach(), source.grad, weights.grad, *(part.grad for _, part in parts)]
    assert_close(found, [*wanted[:3], wanted[3][first:], wanted[4][first:]], 1e-6)
    assert all(part.grad is None for part, _ in parts)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_join_their_buffers_now_or_later(dtype: torch.dtype, later: bool) -> None:
    chosen, (source, weights, gate_up, down, grad) = choices("all"), tensors(dtype)
    order, counts, chosen_N = rows_of(chosen)
    queue = Queue()
    queue.is_open = later
    for stack in (gate_up, down):
        stack.main_grad = torch.ones(stack.shape)
    with deferring(queue):
        out = gated_experts(source, weights.flatten()[chosen_N], order, counts, (gate_up,), (down,))
    out.backward(grad)
    assert bool(queue) == later and (not later or (gate_up.main_grad == 1).all())
    with torch.no_grad():
        while queue:
            queue.popleft()()
    assert gate_up.grad is None
    wanted = by_hand(chosen, source, weights, gate_up, down, grad)
    found = [gate_up.main_grad - 1, down.main_grad - 1]
    assert_close(found, wanted[3:], 1e-6 if dtype == torch.float32 else 2e-2)


def test_nothing_waits_for_frozen_experts() -> None:
    chosen, (source, weights, gate_up, down, grad) = choices("all"), tensors()
    order, counts, chosen_N = rows_of(chosen)
    queue = Queue()
    with deferring(queue):
        frozen = gate_up.detach(), down.detach()
        out = gated_experts(source, weights.flatten()[chosen_N], order, counts, *((each,) for each in frozen))
    out.backward(grad)
    wanted = by_hand(chosen, source, weights, gate_up, down, grad)
    assert not queue
    assert_close([out.detach(), source.grad, weights.grad], wanted[:3], 1e-6)


def test_no_row_at_all() -> None:
    source, _, gate_up, down, grad = tensors()
    order, counts, _ = rows_of(torch.full((SOURCES, SLOTS), EXPERTS))
    out = gated_experts(source, torch.zeros(0), order, counts, (gate_up,), (down,))
    out.backward(grad)
    assert not out.any() and not source.grad.any() and not gate_up.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """A sum in bf16 from term to term would lose the last six of these."""
    values = torch.tensor([256.0, 1, 1, 1, 1, 1, 1]).to(dtype)[:, None].repeat(1, 16)
    order = Order(torch.zeros(7, dtype=torch.int64), torch.arange(7)[None])
    assert sum_rows(values, order)[0, 0] == torch.tensor(262.0).to(dtype)
    assert torch.equal(take_rows(values[:1], order), values[:1].expand(7, -1))
