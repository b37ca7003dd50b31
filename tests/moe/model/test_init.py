"""Initial weights: the same under every layout, since each canonical tensor draws from its own stream."""

import pytest
import torch
from torch import Tensor

from moe.config import TuneConfig
from moe.model.init import init_adapters
from moe.model.transformer import Transformer
from moe.train.tuning import attach_adapters
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.shards import Piece, parameter_pieces
from tests.ranks import run_ranks
from tests.reduced import canonical_parameters
from tests.small import SMALL_MODEL


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(canonical_parameters(Transformer(SMALL_MODEL, dtype=dtype, seed=seed)))


def cut_weights(rank: int, world_size: int, layout: Layout) -> list[Piece]:
    return list(parameter_pieces(Transformer(SMALL_MODEL, groups=build_groups(layout))))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=4, ep=4),
        Layout(tp=2, ep=2),
        Layout(tp=2, dp=2, ep=2, etp=2),
        Layout(dp=2, etp=2),
        Layout(cp=2),
    ],
    ids=Layout.describe,
)
def test_every_layout_begins_alike(layout: Layout) -> None:
    """Each part is that of the whole tensor, and nothing of any tensor is missing."""
    whole = weights()
    seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}
    for parts in run_ranks(layout.world_size, cut_weights, layout):
        for piece in parts:
            assert torch.equal(piece.tensor, whole[piece.name][piece.place]), piece.name
            seen[piece.name][piece.place] = True
    assert all(there.all() for there in seen.values())


def test_distribution() -> None:
    for name, tensor in weights().items():
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            error = 5 / tensor.numel() ** 0.5  # five sigma
            assert tensor.mean().abs() < error * SMALL_MODEL.init_std, name
            assert tensor.std().item() == pytest.approx(SMALL_MODEL.init_std, rel=error), name


def test_adapters_begin_by_adding_nothing() -> None:
    """Down within 1 / sqrt(inputs), of each expert too, and up 0."""
    model = Transformer(SMALL_MODEL)
    attach_adapters(model, TuneConfig(method="lora", lora_rank=3))
    init_adapters(model, 0)
    found = {name: tensor for name, tensor in canonical_parameters(model) if ".lora." in name}
    assert "layers.2.moe.experts.7.gate_up.lora.down.weight" in found
    drawn = [name for name in found if name.endswith("down.weight")]
    for name in drawn:
        limit = found[name].shape[1] ** -0.5
        assert 0.5 * limit < found[name].abs().max() <= limit and found[name].min() < 0, name
        assert not found[name.replace("lora.down", "lora.up")].any()
    assert len(found) == 2 * len(drawn) == 2 * len({tuple(found[name][0, :4].tolist()) for name in drawn})


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
