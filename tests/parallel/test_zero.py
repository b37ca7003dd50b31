"""ZeRO over copies in different groups: exact sums, one norm, owned shards, nothing kept twice."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.linear import GroupedLinear, Linear
from parallel.runs import runs
from parallel.zero import ParameterSet, Zero
from tests.parallel.replicas import (
    SPECS,
    UNITS,
    Flat,
    add_gradients,
    assembled,
    assert_equal,
    build,
    canonical,
    gradient,
    owned,
    place,
    start,
    travelling,
)
from tests.ranks import run_ranks
from tests.reduced import norm_of


def reduce(rank: int, world_size: int) -> tuple[list[Flat], float, float]:
    parameters, zero = build(rank, world_size)
    add_gradients(parameters, rank, world_size, step=7)
    zero.clear()  # what was added before is forgotten
    add_gradients(parameters, rank, world_size)
    zero.finish_reduce()
    held, norm = travelling(owned(zero, "grad")), norm_of(zero)
    for segment in zero.segments():
        segment.grad.mul_(0.5)
    return held, norm, norm_of(zero)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_are_summed_over_copies_and_normed_once(world_size: int) -> None:
    results = run_ranks(world_size, reduce)
    expected = {name: gradient(name) for name in SPECS}
    assert_equal(assembled(held for held, _, _ in results), canonical("grad", expected))
    norm = math.sqrt(sum(float(whole.double().square().sum()) for whole in expected.values()))
    for _, found, halved in results:
        assert found == pytest.approx(norm, rel=1e-12)
        assert halved == pytest.approx(norm / 2, rel=1e-12)
    assert len({found for _, found, _ in results}) == 1  # to the bit: clipping must not part the copies


def descend(rank: int, world_size: int, dtype: torch.dtype) -> tuple[list[Flat], dict[str, Tensor]]:
    """Two steps of plain descent on the masters; also what every rank computes with in the end."""
    parameters, zero = build(rank, world_size, dtype, bucket_bytes=500)
    arrived: dict[str, Tensor] = {}
    for step in range(2):
        zero.clear()
        add_gradients(parameters, rank, world_size, step)
        zero.finish_reduce()
        for segment in zero.segments():
            segment.master.sub_(segment.grad, alpha=2.0**-9)
        if rank == 1:
            time.sleep(0.2)  # whoever does not wait reads old weights
        zero.start_gather()
        for unit, sets in UNITS.items():
            zero.arrive(unit)
            zero.arrive(unit)  # a second time nothing happens
            arrived.update((name, parameters[name].detach().clone()) for names in sets for name in names)
    return travelling(owned(zero, "master")), arrived


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 4])
def test_masters_move_in_fp32_and_all_copies_get_the_rounded_weights(
    world_size: int, dtype: torch.dtype
) -> None:
    results = run_ranks(world_size, descend, dtype)
    moved = {}
    for name in SPECS:
        moved[name] = start(name) if name == "wide.gain" else start(name).to(dtype).float()
        for step in range(2):
            moved[name] = moved[name].sub(gradient(name, step), alpha=2.0**-9)
    assert_equal(assembled(masters for masters, _ in results), canonical("master", moved))
    for rank, (_, parameters) in enumerate(results):
        for name, parameter in parameters.items():
            here = place(name, rank, world_size)
            rounded = moved[name] if name == "wide.gain" else moved[name].to(dtype)
            assert torch.equal(parameter, rounded.chunk(here.parts, SPECS[name].dim)[here.part]), name


def weights(rank: int, world_size: int, dtype: torch.dtype) -> list[Flat]:
    _, zero = build(rank, world_size, dtype)
    assert all((s.master is s.weight) == (s.parameter.dtype == torch.float32) for s in zero.segments())
    assert all(s.weight.dtype == s.parameter.dtype for s in zero.segments())
    dist.barrier()  # nobody leaves while others still connect
    return travelling(owned(zero, "weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_tile_the_weights_once(dtype: torch.dtype) -> None:
    expected = {name: start(name).to(torch.float32 if name == "wide.gain" else dtype) for name in SPECS}
    assert_equal(assembled(run_ranks(4, weights, dtype)), canonical("weight", expected))


def reduce_fine_values(rank: int, world_size: int, reduce_dtype: torch.dtype) -> list[Tensor]:
    parameters, zero = build(rank, world_size, reduce_dtype=reduce_dtype)
    for parameter in parameters.values():
        parameter.main_grad.fill_(1 + 2.0**-9)  # bf16 rounds it to 1
    zero.finish_reduce()
    return [segment.grad.clone() for segment in zero.segments() if segment.name != "own.weight"]


@pytest.mark.parametrize(("reduce_dtype", "sent"), [(torch.float32, 1 + 2.0**-9), (torch.bfloat16, 1.0)])
def test_the_reduction_travels_in_its_dtype(reduce_dtype: torch.dtype, sent: float) -> None:
    for gradients in run_ranks(2, reduce_fine_values, reduce_dtype):
        for found in gradients:
            assert found.dtype == torch.float32
            assert found.eq(2 * sent).all()


def reduce_in_order(rank: int, world_size: int, orders: list[list[str]]) -> list[Flat]:
    parameters, zero = build(rank, world_size)
    names = {unit: [name for group in sets for name in group] for unit, sets in UNITS.items()}
    order = orders[rank % len(orders)]
    for _ in range(2):
        zero.clear()
        for unit in order:
            add_gradients(parameters, rank, world_size, names=names[unit])
            zero.start_reduce(unit)
        rest = [name for unit in UNITS if unit not in order for name in names[unit]]
        add_gradients(parameters, rank, world_size, names=rest)
        zero.finish_reduce()
    return travelling(owned(zero, "grad"))


@pytest.mark.parametrize(
    "orders",
    [
        [["last"]],
        [["last", "first"]],
        [["first", "last"]],
        [["last", "first"], ["first"], [], ["first", "last"]],
    ],
    ids=["a part", "backward", "forward", "every rank another"],
)
def test_units_are_reduced_while_others_grow(orders: list[list[str]]) -> None:
    found = assembled(run_ranks(4, reduce_in_order, orders, timeout=30))
    assert_equal(found, canonical("grad", {name: gradient(name) for name in SPECS}))


def go_ahead(rank: int, world_size: int) -> list[bool]:
    """Rank 1 joins each collective only when rank 0 says that it has gone on without it."""
    _, zero = build(rank, world_size)
    passed = []
    for begin, finish in (
        (lambda: zero.start_reduce("last"), zero.finish_reduce),
        (zero.start_gather, zero.arrive_all),
    ):
        word = torch.zeros(1)
        if rank == 0:
            begin()
            dist.send(word + 1, 1)
        else:
            dist.recv(word, 0)
            begin()
        finish()
        passed.append(rank == 0 or word.item() == 1)
    return passed


def test_what_is_started_waits_for_nobody() -> None:
    assert run_ranks(2, go_ahead, timeout=30) == [[True, True]] * 2


class Model(nn.Module):
    """A product, an expert stack, and a parameter whose gradient autograd makes itself."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dense = Linear(3, 2, dtype)
        self.experts = GroupedLinear(range(4), 2, 2, dtype)
        self.gain = nn.Parameter(torch.ones(2, dtype=dtype))
        for parameter in (self.dense.weight, self.experts.weight):
            nn.init.constant_(parameter, 0.5)

    def forward(self, seed: int) -> Tensor:
        rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(self.gain.dtype)
        return (self.experts(self.dense(rows) * self.gain, (2, 0, 3, 0)).float() ** 2).sum()


def alone(model: nn.Module, **options: int) -> Zero:
    """One unit without copies."""
    return Zero([("all", [ParameterSet(tuple(model.named_parameters()), None)])], None, **options)  # type: ignore[arg-type]


def test_main_grad_equals_grad_over_microbatches() -> None:
    plain, buffered = Model(), Model()
    zero = alone(buffered)
    for seed in range(3):
        plain(seed).backward()
        buffered(seed).backward()
    zero.finish_reduce()
    for mine, theirs in zip(buffered.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine.main_grad, theirs.grad)
    whole = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert norm_of(zero) == pytest.approx(whole.norm().item(), rel=1e-6)


def test_bf16_parameters_accumulate_in_fp32() -> None:
    model = nn.ParameterDict({"gain": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))})
    alone(model)
    for size in (1.0, *[2.0**-9] * 64):
        (model["gain"] * size).sum().backward()
    assert model["gain"].main_grad.dtype == torch.float32
    assert model["gain"].main_grad.item() == 1.0 + 64 * 2.0**-9


def test_the_norm_is_summed_in_fp64() -> None:
    model = nn.ParameterDict({"gain": nn.Parameter(torch.zeros(2))})
    zero = alone(model)
    model["gain"].main_grad.fill_(1e30)  # its square overflows fp32
    assert norm_of(zero) == pytest.approx(math.sqrt(2) * 1e30)


def test_gradients_added_while_summed_are_noticed() -> None:
    model = Model()
    zero = alone(model)
    model(0).backward()
    zero.start_reduce("all")
    with pytest.raises(AssertionError, match="summed already"):
        zero.start_reduce("all")
    with pytest.raises(AssertionError, match="being summed"):
        zero.clear()
    model.experts.weight.main_grad[1].add_(1)
    with pytest.raises(AssertionError, match="gradient added while summed"):
        zero.finish_reduce()


def test_weights_that_no_forward_waited_for_arrive_before_they_move() -> None:
    zero = alone(Model())
    for _ in range(2):
        zero.start_gather()
        with pytest.raises(AssertionError, match="on their way already"):
            zero.start_gather()
        zero.finish_reduce()


def test_frozen_parameters_are_left_alone() -> None:
    model = Model()
    frozen, memory = model.dense.weight, model.dense.weight.data_ptr()
    frozen.requires_grad_(False)
    zero = alone(model)
    assert [segment.name for segment in zero.segments()] == ["gain", "experts.weight"]
    assert not hasattr(frozen, "main_grad") and frozen.data_ptr() == memory
    model(0).backward()
    zero.finish_reduce()
    zero.start_gather()
    zero.arrive("all")
    assert frozen.eq(0.5).all() and norm_of(zero) > 0


def test_a_unit_may_be_frozen_as_a_whole() -> None:
    model = Model().requires_grad_(False)
    zero = alone(model)
    zero.start_reduce("all")
    zero.finish_reduce()
    zero.start_gather()
    zero.arrive("all")
    assert norm_of(zero) == 0.0 and list(zero.segments()) == []


def test_parameters_become_aligned_views_and_stay_themselves() -> None:
    model = Model(torch.bfloat16)
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    alone(model)
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and torch.equal(parameter, values[name])
        assert parameter.storage_offset() % 64 == 0
    assert model.experts.weight.experts == (0, 1, 2, 3)


def test_buckets_are_cut_at_the_limit_and_by_dtype() -> None:
    assert list(runs([3, 4, 9, 1, 1, 6], lambda item: item, 7)) == [[3, 4], [9], [1, 1], [6]]
    model = Model()
    model.gain.data = model.gain.data.bfloat16()
    alone(model, bucket_bytes=16 * 4)
    storages = {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}
    assert len(set(storages.values())) == 3  # 6 and 16 elements exceed 16 together


def storages(rank: int, world_size: int) -> int:
    """Bytes of the masters of bf16 weights on this rank, as they are allocated."""
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    replicas = dist.group.WORLD if world_size > 1 else None
    zero = Zero([("all", [ParameterSet((("weight", parameter),), replicas)])], replicas)
    dist.barrier()
    return sum(segment.master.untyped_storage().nbytes() for segment in zero.segments())


def test_masters_are_kept_once() -> None:
    assert run_ranks(1, storages) == [4 * 1024]  # aligned to 64 elements
    assert run_ranks(4, storages) == [1024] * 4
