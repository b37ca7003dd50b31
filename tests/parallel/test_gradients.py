"""Gradient buffers: one fp32 sum over copies, one norm over parts, every element counted once."""

import math

import pytest
import torch
from torch import Tensor, nn

from parallel.gradients import GradientBuffers, parameter_sets
from parallel.groups import build_groups, single
from parallel.layout import Layout
from parallel.linear import GroupedLinear, Linear
from tests.ranks import run_ranks

NUM_EXPERTS = 4


class Model(nn.Module):
    """A product, an expert stack, and parameters whose gradient autograd makes itself."""

    def __init__(
        self, num_local: int = NUM_EXPERTS, first: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.dense = Linear(3, 2, dtype)
        self.experts = GroupedLinear(num_local, first, 2, 2, dtype)
        self.gain = nn.Parameter(torch.ones(2, dtype=dtype))
        for parameter in (self.dense.weight, self.experts.weight):
            nn.init.constant_(parameter, 0.5)


def gradient(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reduce(rank: int, world_size: int, ep: int) -> tuple[float, float, Tensor, Tensor, int]:
    """Rank r adds the gradient of seed r to dense, of seed 100 + r x E + expert to each of its experts."""
    groups = build_groups(Layout(dp=world_size, ep=ep))
    num_local = NUM_EXPERTS // ep
    first = groups.layout.coordinates(rank)["ep"] * num_local
    model = Model(num_local, first)
    buffers = GradientBuffers(parameter_sets(model.parameters(), groups))
    model.dense.weight.main_grad.copy_(gradient(model.dense.weight.shape, rank))
    for local in range(num_local):
        seed = 100 + rank * NUM_EXPERTS + first + local
        model.experts.weight.main_grad[local] = gradient(torch.Size((2, 2)), seed)
    buffers.reduce()
    norm = buffers.norm()
    buffers.scale(0.5)
    halved = buffers.norm()
    dense, experts = model.dense.weight.main_grad.clone(), model.experts.weight.main_grad.clone()
    buffers.zero()
    assert buffers.norm() == 0.0
    return norm, halved, dense, experts, first


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_norm_counts_every_element_once_and_copies_are_summed(ep: int) -> None:
    results = run_ranks(4, reduce, ep)
    dense = sum(gradient(torch.Size((2, 3)), rank) for rank in range(4))
    experts = torch.zeros(NUM_EXPERTS, 2, 2)
    for rank in range(4):
        first, count = (rank % ep) * NUM_EXPERTS // ep, NUM_EXPERTS // ep
        for expert in range(first, first + count):
            experts[expert] += gradient(torch.Size((2, 2)), 100 + rank * NUM_EXPERTS + expert)
    expected = math.sqrt(float(dense.square().sum() + experts.square().sum()))
    for norm, halved, half_dense, half_experts, first in results:
        assert norm == pytest.approx(expected, rel=1e-6)
        assert halved == pytest.approx(expected / 2, rel=1e-6)
        torch.testing.assert_close(half_dense, dense / 2)
        torch.testing.assert_close(half_experts, experts[first : first + len(half_experts)] / 2)
    assert len({norm for norm, *_ in results}) == 1  # to the bit: clipping must not part the copies


def loss(model: Model, seed: int) -> Tensor:
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(model.gain.dtype)
    return (model.experts(model.dense(rows) * model.gain, (2, 0, 3, 0)).float() ** 2).sum()


def test_main_grad_equals_grad_over_microbatches() -> None:
    plain, buffered = Model(), Model()
    buffers = GradientBuffers(parameter_sets(buffered.parameters(), single()))
    for seed in range(3):
        loss(plain, seed).backward()
        loss(buffered, seed).backward()
    for mine, theirs in zip(buffered.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine.main_grad, theirs.grad)
    whole = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert buffers.norm() == pytest.approx(whole.norm().item(), rel=1e-6)


def test_bf16_parameters_accumulate_in_fp32() -> None:
    gain = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    GradientBuffers(parameter_sets([gain], single()))
    for size in (1.0, *[2.0**-9] * 64):
        (gain * size).sum().backward()
    assert gain.main_grad.dtype == torch.float32
    assert gain.main_grad.item() == 1.0 + 64 * 2.0**-9


def test_a_model_without_experts_has_one_set() -> None:
    model = nn.Linear(2, 2)
    (dense,) = parameter_sets(model.parameters(), single())
    assert dense.parameters == tuple(model.parameters())


def test_the_norm_is_summed_in_fp64() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    buffers = GradientBuffers(parameter_sets([parameter], single()))
    parameter.main_grad.fill_(1e30)  # its square overflows fp32
    assert buffers.norm() == pytest.approx(math.sqrt(2) * 1e30)
