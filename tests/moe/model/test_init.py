"""Initial weights: the same under every layout, since each canonical tensor draws from its own stream."""

import pytest
import torch
from torch import Tensor

from moe.model.transformer import Transformer
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.shards import canonical_parameters
from tests.ranks import run_ranks
from tests.small import SMALL_MODEL


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(canonical_parameters(Transformer(SMALL_MODEL, dtype=dtype, seed=seed)))


def cut_weights(rank: int, world_size: int) -> dict[str, Tensor]:
    groups = build_groups(Layout(dp=world_size, ep=world_size))
    return dict(canonical_parameters(Transformer(SMALL_MODEL, group=groups.ep)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_begins_alike(world_size: int) -> None:
    whole, seen = weights(), set()
    for part in run_ranks(world_size, cut_weights):
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
        seen |= set(part)
    assert seen == set(whole)


def test_distribution() -> None:
    for name, tensor in weights().items():
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            error = 5 / tensor.numel() ** 0.5  # five sigma
            assert tensor.mean().abs() < error * SMALL_MODEL.init_std, name
            assert tensor.std().item() == pytest.approx(SMALL_MODEL.init_std, rel=error), name


def test_no_two_tensors_share_a_draw_and_seeds_differ() -> None:
    first = [tensor.flatten()[:4].tolist() for tensor in weights().values() if tensor.dim() > 1]
    other = [tensor.flatten()[:4].tolist() for tensor in weights(seed=1).values() if tensor.dim() > 1]
    assert len({tuple(values) for values in first + other}) == len(first) + len(other)


def test_the_global_random_state_does_not_matter() -> None:
    torch.manual_seed(5)
    first = weights()
    torch.manual_seed(6)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights().items())


def test_bf16_rounds_the_same_draws() -> None:
    whole = weights()
    assert all(torch.equal(t, whole[name].bfloat16()) for name, t in weights(dtype=torch.bfloat16).items())
