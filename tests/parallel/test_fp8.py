"""Products in FP8: the emulation against its definition, block by block in fp64, and linear.py's rules."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Splits, all_to_all
from parallel.fp8 import Emulated, Packed, Products, quantised
from parallel.groups import single
from parallel.linear import GroupedLinear, Linear, Queue, deferring
from tests.ranks import run_ranks
from tests.reduced import buffers

FP8 = Products(Emulated())
BF16 = torch.bfloat16


def nearest(value: float) -> float:
    """The E4M3 number nearest to one of at most 448, ties to even: 3 bits of fraction, exponents from -6."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return round(value / step) * step


def read_back(matrix: Tensor, height: int, width: int) -> Tensor:
    """[R, C] as blocks of height x width give it back, in fp64, by the definition."""
    out = torch.zeros(matrix.shape, dtype=torch.float64)
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            block = matrix[top : top + height, left : left + width].double()
            amax = block.abs().max().item()
            scale = 448.0 / amax if amax else 1.0
            rounded = [[nearest(value * scale) / scale for value in row] for row in block.tolist()]
            out[top : top + height, left : left + width] = torch.tensor(rounded, dtype=torch.float64)
    return out


def expected(
    rows: Tensor, grad: Tensor, counts: Sequence[int], weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradients of rows and of weights of a grouped product, expert after expert."""
    made = []
    for own, upstream, weight in zip(rows.split(counts), grad.split(counts), weights, strict=True):
        square = read_back(weight, 128, 128)
        made.append(
            (
                read_back(own, 1, 128) @ square.t(),
                read_back(upstream, 1, 128) @ square,
                read_back(upstream, 128, 1).t() @ read_back(own, 128, 1),
            )
        )
    outputs, grads, weight_grads = zip(*made, strict=True)
    return torch.cat(outputs), torch.cat(grads), torch.stack(weight_grads)


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Numbers over nine powers of two, so that a factor of another block would be seen, and some zeros."""
    torch.manual_seed(seed)
    return (torch.randn(shape) * 2.0 ** torch.randint(-6, 3, shape)).where(torch.rand(shape) > 0.05, 0.0)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= 1e-6 * wanted.norm()


def scaled_layer(
    grouped: int = 0, num_chosen: int = 0, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    shape = (150, 140)  # a trailing block either way
    layer = (
        GroupedLinear(range(grouped), *shape, dtype, num_chosen=num_chosen)
        if grouped
        else Linear(*shape, dtype)
    )
    layer.fp8 = FP8
    for number, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(uneven(*parameter.shape, seed=number))
    return layer


def test_a_grouped_product_is_its_definition() -> None:
    """To fp32's rounding, with an expert of more than a block of rows, one of none, and cut blocks."""
    counts = (130, 0, 7)
    layer, rows = scaled_layer(3), uneven(137, 150, seed=7).requires_grad_()
    upstream = uneven(137, 140, seed=8)
    made = layer(rows, counts)
    made.backward(upstream)
    outputs, grad_rows, grad_weights = expected(rows.detach(), upstream, counts, layer.weight.detach())
    close(made.detach(), outputs)
    close(rows.grad, grad_rows)
    close(layer.weight.grad, grad_weights)
    assert (made - rows.detach() @ layer.weight[0].t())[:130].norm() > 1e-2 * made.norm()  # FP8, not fp32


def test_a_linear_is_a_group_of_one() -> None:
    layer, rows = scaled_layer(), uneven(2, 3, 150, seed=7).requires_grad_()
    upstream = uneven(2, 3, 140, seed=8)
    layer(rows).backward(upstream)
    flat, grad = rows.detach().flatten(0, 1), upstream.flatten(0, 1)
    outputs, grad_rows, grad_weights = expected(flat, grad, (6,), layer.weight.detach()[None])
    close(layer(rows).detach().flatten(0, 1), outputs)
    close(rows.grad.flatten(0, 1), grad_rows)
    close(layer.weight.grad, grad_weights[0])


def test_results_have_the_dtypes_of_bf16() -> None:
    layer = scaled_layer(2, dtype=BF16)
    rows = uneven(9, 150).to(BF16).requires_grad_()
    made = layer(rows, (4, 5))
    made.sum().backward()
    assert made.dtype == rows.grad.dtype == layer.weight.grad.dtype == BF16
    buffers(layer, single())
    layer(rows, (4, 5)).sum().backward()
    assert layer.weight.main_grad.dtype == torch.float32 and layer.weight.main_grad.any()


@pytest.mark.parametrize("size", [1.0, 2e-36, 3e38])
def test_the_greatest_of_a_block_is_kept_whatever_its_size(size: float) -> None:
    read = quantised(torch.tensor([[size, -size / 2, 0.0]]), (1, 128)).numbers()
    torch.testing.assert_close(read, torch.tensor([[size, -size / 2, 0.0]]), rtol=1e-6, atol=0.0)


def test_numbers_too_small_for_a_scale_stay_numbers() -> None:
    rows = torch.tensor([[1e-38, 1e-44, 0.0]])
    torch.testing.assert_close(quantised(rows, (1, 128)).numbers(), rows, rtol=0.0, atol=1e-39)


def test_zeros_have_scale_one() -> None:
    zeros = quantised(torch.zeros(3, 200), (1, 128))
    assert torch.equal(zeros.inverses, torch.ones(3, 2)) and not zeros.numbers().any()
    nothing = quantised(torch.zeros(0, 200), (1, 128)).numbers()
    assert nothing.shape == (0, 200)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_its_block_alone(broken: float) -> None:
    rows = torch.ones(2, 200)
    rows[0, 3] = broken
    read = quantised(rows, (1, 128)).numbers()
    assert read[0, :128].isnan().all() and (read[0, 128:] == 1).all() and (read[1] == 1).all()


def test_no_expert_decides_a_scale_of_another() -> None:
    """Where an expert's rows begin in the middle of 128, the rows before it, however great, do not matter."""
    layer = scaled_layer(2)
    buffers(layer, single())
    upstream = uneven(8, 140)
    found = []
    for size in (1.0, 1e4):
        layer.weight.main_grad.zero_()
        rows = uneven(8, 150)
        rows[:3] *= size
        layer(rows, (3, 5)).backward(upstream)
        found.append(layer.weight.main_grad.clone())
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("grouped", [0, 3])
def test_gradients_go_to_main_grad_and_wait_in_a_queue(grouped: int) -> None:
    """At once and later they are the plain gradient to the bit, and add up."""
    plain, at_once, later = (scaled_layer(grouped) for _ in range(3))
    queue = Queue()
    rows, upstream = uneven(9, 150).requires_grad_(), uneven(9, 140)
    for layer in (plain, at_once, later):
        if layer is not plain:
            buffers(layer, single())
        with deferring(queue) if layer is later else nullcontext():
            for _ in range(2):
                (layer(rows, (4, 0, 5)) if grouped else layer(rows)).backward(upstream)
    assert plain.weight.grad.any() and torch.equal(at_once.weight.main_grad, plain.weight.grad)
    assert len(queue) == 2 and not later.weight.main_grad.any() and later.weight.grad is None
    while queue:
        queue.popleft()()
    assert torch.equal(later.weight.main_grad, at_once.weight.main_grad)


def test_two_stacks_are_one_product_and_a_frozen_one_gets_no_gradient() -> None:
    whole, parted = scaled_layer(3), scaled_layer(3, num_chosen=2)
    parted.weight.data.copy_(whole.weight[:1])
    parted.chosen.data.copy_(whole.weight[1:])
    parted.weight.requires_grad_(False)
    rows, upstream, counts = uneven(9, 150).requires_grad_(), uneven(9, 140), (4, 2, 3)
    found = []
    for layer in (whole, parted):
        rows.grad = None
        made = layer(rows, counts)
        made.backward(upstream)
        found.append((made.detach(), rows.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert parted.weight.grad is None and torch.equal(parted.chosen.grad, whole.weight.grad[1:])


def test_all_experts_of_a_rank_may_be_in_the_second_stack() -> None:
    whole, parted = scaled_layer(3), scaled_layer(3, num_chosen=3)
    parted.chosen.data.copy_(whole.weight)
    assert len(parted.weight) == 0
    for layer in (whole, parted):
        layer(uneven(9, 150), (4, 2, 3)).backward(uneven(9, 140))
    assert torch.equal(parted.chosen.grad, whole.weight.grad)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("width", [32, 150, 257])
def test_rows_survive_the_wire_as_their_blocks_give_them_back(num_rows: int, width: int) -> None:
    rows = uneven(num_rows, width).to(BF16)
    packed = Packed().pack(rows)
    assert packed.dtype == torch.uint8 and packed.shape == (num_rows, width + 4 * math.ceil(width / 128))
    arrived = Packed().unpack(packed.flip(0), rows).flip(0)
    assert torch.equal(arrived, quantised(rows, (1, 128)).numbers().to(BF16)) and arrived.dtype == BF16
    again = quantised(arrived, (1, 128)).values.view(torch.uint8)
    assert torch.equal(again, quantised(rows, (1, 128)).values.view(torch.uint8))


def travelled(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of either rank to the other: what was sent, what came, and the gradient of what was sent."""
    other = (0, 4) if rank == 0 else (4, 0)
    splits = Splits(other, other, dist.group.WORLD, Packed())
    rows = uneven(4, 150, seed=rank).to(BF16).requires_grad_()
    arrived = all_to_all(rows, splits)
    arrived.backward(uneven(4, 150, seed=10 + rank).to(BF16))
    return rows.detach(), arrived.detach(), rows.grad


def test_rows_travel_packed_and_their_gradients_as_they_are() -> None:
    found = run_ranks(2, travelled)
    for rank, (_, arrived, grad) in enumerate(found):
        assert torch.equal(arrived, quantised(found[1 - rank][0], (1, 128)).numbers().to(BF16))
        assert torch.equal(grad, uneven(4, 150, seed=11 - rank).to(BF16))


def test_counts_must_be_those_of_the_rows() -> None:
    with pytest.raises(AssertionError, match="8 rows counted, 9 there"):
        scaled_layer(2)(uneven(9, 150), (3, 5))
    with pytest.raises(AssertionError, match="3 counts"):
        scaled_layer(2)(uneven(9, 150), (3, 5, 1))
