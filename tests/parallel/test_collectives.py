"""Uneven exchanges, the ends of a tensor-parallel region, gradients, and identity without a group."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import (
    Splits,
    all_reduce,
    all_to_all,
    barrier,
    gather_sequence,
    group_rank,
    group_size,
    scatter_sum,
    start_all_to_all,
)
from tests.ranks import run_ranks

# Rows from rank i (line) to rank j (column): uneven, one rank sends nothing, one receives nothing.
TRAFFIC = [[2, 0, 3], [0, 0, 0], [1, 0, 4]]


def splits_of(rank: int) -> Splits:
    return Splits(tuple(TRAFFIC[rank]), tuple(line[rank] for line in TRAFFIC), dist.group.WORLD)


def labelled_rows(rank: int) -> Tensor:
    """Row n of rank r for rank j holds (r, j, n)."""
    rows = [(rank, to, n) for to, count in enumerate(TRAFFIC[rank]) for n in range(count)]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 3)


def exchange(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    splits = splits_of(rank)
    rows = labelled_rows(rank).requires_grad_()
    received = all_to_all(rows, splits)
    (received * (received.detach() + 1)).sum().backward()
    assert rows.grad is not None
    back = start_all_to_all(received.detach(), splits.reversed()).wait()
    return received.detach(), rows.grad, back


def test_uneven_rows_arrive_in_order_and_gradients_return() -> None:
    for rank, (received, gradient, back) in enumerate(run_ranks(3, exchange)):
        expected = [labelled_rows(source) for source in range(3)]
        expected = [rows[rows[:, 1] == rank] for rows in expected]
        assert torch.equal(received, torch.cat(expected))
        assert torch.equal(gradient, labelled_rows(rank) + 1)  # what the receiver's row says of itself
        assert torch.equal(back, labelled_rows(rank))


def exchange_columns(rank: int, world_size: int) -> Tensor:
    counts = torch.arange(4).view(2, 2) + 10 * rank
    one_each = Splits((1, 1), (1, 1), dist.group.WORLD)
    return start_all_to_all(counts.t(), one_each).wait()  # integers, and not contiguous


def test_integers_and_strided_rows_travel() -> None:
    first, second = run_ranks(2, exchange_columns)
    assert first.tolist() == [[0, 2], [10, 12]]
    assert second.tolist() == [[1, 3], [11, 13]]


def start_before_the_peer(rank: int, world_size: int) -> Tensor:
    group, token = dist.new_group([0, 1]), torch.zeros(1)
    splits = Splits((1, 1), (1, 1), group)
    if rank == 1:
        dist.recv(token, 0)  # comes only when rank 0 has returned from starting
    wire = start_all_to_all(torch.tensor([[rank], [rank + 10]]), splits)
    if rank == 0:
        dist.send(token, 1)
    return wire.wait()


def test_an_exchange_is_in_flight_before_the_peer_joins() -> None:
    first, second = run_ranks(2, start_before_the_peer, timeout=20)
    assert first.tolist() == [[0], [1]]
    assert second.tolist() == [[10], [11]]


def reduce_and_size(rank: int, world_size: int) -> tuple[Tensor, Tensor, int, int]:
    value = torch.tensor([rank, 1])
    reduced = all_reduce(value, dist.group.WORLD)
    assert reduced is value
    largest = all_reduce(torch.tensor(rank), dist.group.WORLD, op=dist.ReduceOp.MAX)
    barrier(dist.group.WORLD)
    return reduced, largest, group_size(dist.group.WORLD), group_rank(dist.group.WORLD)


def test_reduction_and_sizes() -> None:
    for rank, (total, largest, size, place) in enumerate(run_ranks(3, reduce_and_size)):
        assert (total.tolist(), int(largest), size, place) == ([3, 3], 2, 3, rank)


def stretch(seed: int, length: int, dtype: torch.dtype) -> Tensor:
    """[B, S, heads, D]: small integers, so that their sums are exact in bf16 too."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (2, length, 3, 5), generator=stream).to(dtype)


def ends_of_a_region(rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    group = dist.group.WORLD
    part = stretch(rank, 4, dtype).requires_grad_()
    gathered = gather_sequence(part, group)
    gathered.backward(stretch(10 + rank, 4 * world_size, dtype))
    whole = stretch(20 + rank, 4 * world_size, dtype).requires_grad_()
    scattered = scatter_sum(whole, group)
    scattered.backward(stretch(30 + rank, 4, dtype).transpose(2, 3).contiguous().transpose(2, 3))
    assert part.grad is not None and whole.grad is not None
    return gathered.detach(), part.grad, scattered.detach(), whole.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gather_and_scatter_are_each_others_gradient(world_size: int, dtype: torch.dtype) -> None:
    """What is gathered is summed on the way back, and what is summed is gathered."""

    def side_by_side(first_seed: int) -> Tensor:
        return torch.cat([stretch(first_seed + rank, 4, dtype) for rank in range(world_size)], 1)

    def total(first_seed: int) -> Tensor:
        return sum(stretch(first_seed + rank, 4 * world_size, dtype) for rank in range(world_size))

    for rank, results in enumerate(run_ranks(world_size, ends_of_a_region, dtype)):
        gathered, grad_part, scattered, grad_whole = results
        mine = slice(4 * rank, 4 * rank + 4)
        assert {result.dtype for result in results} == {dtype}
        assert torch.equal(gathered, side_by_side(0))
        assert torch.equal(grad_part, total(10)[:, mine])
        assert torch.equal(scattered, total(20)[:, mine])
        assert torch.equal(grad_whole, side_by_side(30))


def test_identity_without_a_group() -> None:
    rows, alone = torch.randn(3, 2, requires_grad=True), Splits((3,), (3,), None)
    assert gather_sequence(rows, None) is rows and scatter_sum(rows, None) is rows
    assert all_to_all(rows, alone) is rows
    assert start_all_to_all(rows, alone).wait() is rows
    assert all_reduce(rows, None) is rows
    assert (group_size(None), group_rank(None)) == (1, 0)
    barrier(None)
