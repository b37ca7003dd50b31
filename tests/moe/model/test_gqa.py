"""Grouped-query attention against a loop over heads, and the same however heads and sequences are cut.

Whether it is what transformers computes, tests/moe/hf/test_cards.py shows.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import ModelConfig, RopeConfig
from moe.model.attention import document_mask
from moe.model.attention_layer import AttentionLayer
from moe.model.gqa import GroupedQueryAttention
from moe.model.rope import rotation
from parallel.layout import Layout
from tests.moe.model.cut_attention import (
    LENGTH,
    WIDTH,
    Variant,
    assert_the_same_attention,
    attend,
    build,
    cut_variants,
)
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    attention="gqa",
    hidden_size=WIDTH,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope=RopeConfig(pairs="halves"),
    rms_norm_eps=1e-2,  # large enough to be seen
)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, -1, -1]])


def rms_norm(vectors: Tensor, gain: Tensor) -> Tensor:
    return vectors / (vectors.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * gain


def naive(layer: AttentionLayer, hidden: Tensor, allowed: Tensor) -> Tensor:
    """One head of queries at a time, each with its group's head of keys. `allowed` [B, S, S]."""
    config, weights = layer.config, dict(layer.named_parameters())
    width, group = config.qk_head_dim, config.num_heads // config.kv_heads
    turn = rotation(config.rope, width, torch.arange(hidden.shape[1]), hidden.device)

    def heads(name: str) -> list[Tensor]:
        flat = F.linear(hidden, weights[f"{name}.weight"])
        if config.qk_norm == "full" and name != "value":
            flat = rms_norm(flat, weights[f"{name}_norm.weight"])
        found = list(flat.split(width, -1))
        if config.qk_norm == "head" and name != "value":
            found = [rms_norm(each, weights[f"{name}_norm.weight"]) for each in found]
        return found if name == "value" else [turn.apply(each[:, :, None])[:, :, 0] for each in found]

    queries, keys, values = heads("query"), heads("key"), heads("value")
    mixed = []
    for number, query in enumerate(queries):
        scores = query @ keys[number // group].mT / width**0.5
        mixed.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values[number // group])
    return F.linear(torch.cat(mixed, -1), weights["out.weight"])


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_equals_the_naive_loop(qk_norm: str, num_kv_heads: int | None) -> None:
    """Outputs and every gradient, causal and inside documents."""
    layer, hidden = build(replace(CONFIG, qk_norm=qk_norm, num_kv_heads=num_kv_heads))
    inputs = (hidden.requires_grad_(), *layer.parameters())
    assert len(inputs) == 5 + 2 * (qk_norm != "none")
    upstream = torch.randn_like(hidden)
    causal = torch.ones(2, 8, 8, dtype=torch.bool).tril()
    for mask, allowed in ((None, causal), (document_mask(DOCUMENTS), document_mask(DOCUMENTS)[:, 0])):
        found, expected = attend(layer, hidden, mask), naive(layer, hidden, allowed)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad(found, inputs, upstream)
        theirs = torch.autograd.grad(expected, inputs, upstream)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_a_head_is_as_wide_as_the_hidden_size_leaves() -> None:
    layer = GroupedQueryAttention(replace(CONFIG, head_dim=None, num_heads=2, num_kv_heads=None))
    assert layer.key.weight.shape == layer.query.weight.shape == (WIDTH, WIDTH)


VARIANTS = [
    Variant(replace(CONFIG, qk_norm="none"), masked=True, recompute=False),
    Variant(replace(CONFIG, qk_norm="head"), masked=False, recompute=True),
    Variant(replace(CONFIG, qk_norm="head"), masked=True, recompute=False),
]
WHOLE_NORM = Variant(replace(CONFIG, qk_norm="full"), masked=True, recompute=False)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2)], ids=Layout.describe)
def test_cut_attention_is_the_same_attention(layout: Layout) -> None:
    assert_the_same_attention(layout, VARIANTS + [WHOLE_NORM] * (layout.tp == 1))


def test_keys_and_values_travel_before_they_are_repeated() -> None:
    rows = 2 * LENGTH // 2, 2 * CONFIG.kv_heads * CONFIG.qk_head_dim
    for (stretch,) in run_ranks(2, cut_variants, Layout(cp=2), VARIANTS[:1]):
        assert stretch.sent == [rows]
