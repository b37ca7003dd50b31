"""Rotary embedding: what a rotation must do, and NTK and YaRN against formulas worked out here."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from moe.config import RopeConfig
from moe.model.rope import frequencies, rotation, rotation_scale, softmax_scale

CPU = torch.device("cpu")
KINDS = [
    RopeConfig(),
    RopeConfig(kind="ntk", factor=8),
    RopeConfig(kind="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707),
]


def rotated(rope: RopeConfig, vector: Tensor, length: int) -> Tensor:
    """One vector [R] at every position: [S, R]."""
    heads = vector.expand(1, length, 1, -1)
    return rotation(rope, len(vector), torch.arange(length), CPU).apply(heads)[0, :, 0]


@pytest.mark.parametrize("rope", KINDS)
def test_scores_depend_on_the_distance_alone(rope: RopeConfig) -> None:
    torch.manual_seed(0)
    query, key = rotated(rope, torch.randn(16), 40), rotated(rope, torch.randn(16), 40)
    scores = query @ key.t()
    for distance in (0, 1, 7, 30):
        same = scores.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-4)
    assert scores.diagonal(-1)[0] != pytest.approx(scores.diagonal(-7)[0].item())


@pytest.mark.parametrize(("pairs", "places"), [("interleaved", (2, 1)), ("halves", (1, 4))])
def test_pairs_turn_like_complex_numbers(
    pairs: Literal["interleaved", "halves"], places: tuple[int, int]
) -> None:
    """Pairs (2i, 2i + 1), or (i, i + R/2), as real and imaginary part, turned by position x theta^(-2i/R)."""
    torch.manual_seed(0)
    vector, (stride, apart) = torch.randn(8), places
    for position, row in enumerate(rotated(RopeConfig(theta=100.0, pairs=pairs), vector, 5)):
        for pair in range(4):
            real, imaginary = pair * stride, pair * stride + apart
            number = complex(vector[real], vector[imaginary])
            turned = number * complex(math.cos(a := position * 100.0 ** (-pair / 4)), math.sin(a))
            assert row[[real, imaginary]].tolist() == pytest.approx([turned.real, turned.imag], abs=1e-6)


@pytest.mark.parametrize("rope", KINDS)
def test_a_part_of_the_positions_turns_as_in_the_whole(rope: RopeConfig) -> None:
    """A context-parallel rank holds two stretches that are not neighbours."""
    held = torch.tensor([2, 3, 12, 13])
    whole, part = (rotation(rope, 16, positions, CPU) for positions in (torch.arange(16), held))
    assert torch.equal(part.cos, whole.cos[held]) and torch.equal(part.sin, whole.sin[held])


def test_dtype_stays_and_angles_are_fp32() -> None:
    turn = rotation(RopeConfig(), 8, torch.arange(4), CPU)
    assert turn.cos.dtype == torch.float32 and turn.cos.shape == (4, 4)
    assert turn.apply(torch.ones(1, 4, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["plain", "ntk", "yarn"])
def test_factor_one_is_plain(kind: str) -> None:
    rope = RopeConfig(kind=kind, mscale_all_dim=1.0)
    torch.testing.assert_close(frequencies(rope, 64), frequencies(RopeConfig(), 64))
    assert rotation_scale(rope) == 1.0
    assert softmax_scale(rope, 192) == 192**-0.5


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest() -> None:
    plain, ntk = frequencies(RopeConfig(), 64), frequencies(RopeConfig(kind="ntk", factor=8), 64)
    assert ntk[0] == plain[0] == 1
    assert ntk[-1].item() == pytest.approx(plain[-1].item() / 8, rel=1e-5)
    ratio = plain / ntk
    assert (ratio.diff() > 0).all()  # ever more, from 1 to the factor
    assert ratio[11].item() == pytest.approx(8 ** (11 / 31), rel=1e-4)


def test_yarn_blends_by_turns_over_the_original_context() -> None:
    """DeepSeek-V2-Lite's: R = 64, theta 1e4, context 4096: pairs up to 10 stay, from 23 on interpolated."""
    rope = RopeConfig(kind="yarn", factor=40, original_context=4096, beta_fast=32, beta_slow=1)
    found, plain = frequencies(rope, 64), frequencies(RopeConfig(), 64)
    turns = [4096 / (2 * math.pi * 10000 ** (2 * pair / 64) ** 1) for pair in range(32)]
    low = max(pair for pair in range(32) if turns[pair] >= 32)  # the last that turns so often
    high = min(pair for pair in range(32) if turns[pair] <= 1)  # the first that turns no more than once
    assert (low, high) == (10, 23)
    for pair in range(32):
        share = min(max((pair - low) / (high - low), 0.0), 1.0)
        expected = plain[pair].item() * (1 - share + share / 40)
        assert found[pair].item() == pytest.approx(expected, rel=1e-5)


def test_yarn_scales_of_released_models() -> None:
    lite = RopeConfig(kind="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(lite, 192) * 192**0.5 == pytest.approx(1.5896, abs=1e-4)
    assert rotation_scale(lite) == 1.0
    v3 = RopeConfig(kind="yarn", factor=40, mscale=1.0, mscale_all_dim=1.0)
    assert softmax_scale(v3, 192) * 192**0.5 == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    uneven = RopeConfig(kind="yarn", factor=40, mscale=1.0, mscale_all_dim=0.0)
    assert softmax_scale(uneven, 192) == 192**-0.5
    assert rotation_scale(uneven) == pytest.approx(0.1 * math.log(40) + 1)
    assert rotation(uneven, 8, torch.arange(2), CPU).cos[0, 0].item() == pytest.approx(0.1 * math.log(40) + 1)
