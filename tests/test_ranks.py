"""The multi-rank helper: results, failures and hangs of real gloo processes."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, run_ranks


@dataclass(frozen=True)
class Scale:
    factor: float


def summed(rank: int, world_size: int, scale: Scale) -> tuple[torch.Tensor, int]:
    value = torch.tensor([float(rank), 1.0]) * scale.factor
    dist.all_reduce(value)
    return value, world_size


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def fail_on_last(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise ZeroDivisionError("only here")
    dist.barrier()


def hang_on_first(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(3600)


def die(rank: int, world_size: int) -> None:
    os._exit(7)


def draw(rank: int, world_size: int) -> torch.Tensor:
    return torch.rand(3)


def threads(rank: int, world_size: int) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_form_a_group(world_size: int) -> None:
    results = run_ranks(world_size, summed, Scale(2.0))
    expected = [world_size * (world_size - 1.0), 2.0 * world_size]
    assert [(value.tolist(), size) for value, size in results] == [(expected, world_size)] * world_size


def test_workers_are_reused() -> None:
    first = run_ranks(2, process_id)
    assert len({*first, os.getpid()}) == 3
    assert run_ranks(3, process_id)[:2] == first


def test_results_do_not_depend_on_earlier_calls() -> None:
    first, second = run_ranks(1, draw), run_ranks(1, draw)
    assert torch.equal(first[0], second[0])
    assert run_ranks(2, threads) == [1, 1]


def test_the_failing_ranks_traceback_arrives() -> None:
    before = run_ranks(2, process_id)
    with pytest.raises(
        RankFailure, match=r"(?s)rank 1 of 2 failed.*in fail_on_last.*ZeroDivisionError: only here"
    ):
        run_ranks(2, fail_on_last)
    assert not {*run_ranks(2, process_id)} & {*before}  # the peer that hung in a barrier is gone


def test_a_hang_is_ended_and_the_next_call_works() -> None:
    before = run_ranks(2, process_id)
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"no answer from ranks .* of 2"):
        run_ranks(2, hang_on_first, timeout=0.5)
    assert time.monotonic() - started < 10
    for process in before:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert len(run_ranks(2, summed, Scale(1.0))) == 2


def test_a_dead_process_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="rank 0 of 1 failed:\nthe process died"):
        run_ranks(1, die)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(AssertionError, match="top level"):
        run_ranks(1, lambda rank, world_size: None)
