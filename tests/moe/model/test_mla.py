"""Multi-head latent attention against loops over heads and positions, what a query must not see, and the
same however heads and sequences are cut."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig, RopeConfig
from moe.model.attention import document_mask
from moe.model.attention_layer import AttentionLayer
from moe.model.rope import rotation, softmax_scale
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
    hidden_size=WIDTH, num_heads=3, kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
YARN = RopeConfig(kind="yarn", factor=4, original_context=8, mscale=0.7, mscale_all_dim=0.7)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, -1, -1]])


def rms_norm(vector: Tensor, gain: Tensor, eps: float) -> Tensor:
    return vector / (vector.square().mean() + eps).sqrt() * gain


def naive(layer: AttentionLayer, hidden: Tensor, allowed: Tensor) -> Tensor:
    """Section 2.1 of DeepSeek-V2, one query and one head at a time. `allowed` [B, S, S]."""
    config, weights = layer.config, dict(layer.named_parameters())
    plain, turned = config.qk_nope_head_dim, config.qk_rope_head_dim
    turn = rotation(config.rope, turned, torch.arange(hidden.shape[1]), hidden.device)

    def rotate(vector: Tensor, position: int) -> Tensor:
        return turn.apply(vector.expand(1, hidden.shape[1], 1, -1))[0, position, 0]

    out = torch.zeros_like(hidden)
    for b, sequence in enumerate(hidden):
        queries, keys, values = [], [], []
        for s, h in enumerate(sequence):
            if config.q_lora_rank is None:
                query = weights["query.weight"] @ h
            else:
                small = rms_norm(weights["query.down.weight"] @ h, weights["query.norm.weight"], 1e-6)
                query = weights["query.up.weight"] @ small
            latent = weights["kv_down.weight"] @ h
            latent, shared = latent[: config.kv_lora_rank], rotate(latent[config.kv_lora_rank :], s)
            spread = weights["kv_up.weight"] @ rms_norm(latent, weights["kv_norm.weight"], 1e-6)
            heads = spread.view(config.num_heads, plain + config.v_head_dim)
            queries.append(
                [torch.cat((q[:plain], rotate(q[plain:], s))) for q in query.view(config.num_heads, -1)]
            )
            keys.append([torch.cat((head[:plain], shared)) for head in heads])
            values.append([head[plain:] for head in heads])
        for s in range(len(sequence)):
            seen = [t for t in range(len(sequence)) if allowed[b, s, t]]
            mixed = []
            for head in range(config.num_heads):
                scores = torch.stack([queries[s][head] @ keys[t][head] for t in seen])
                shares = (scores * softmax_scale(config.rope, plain + turned)).softmax(0)
                mixed.append(sum(share * values[t][head] for share, t in zip(shares, seen, strict=True)))
            out[b, s] = weights["out.weight"] @ torch.cat(mixed)
    return out


@pytest.mark.parametrize("q_lora_rank", [None, 5])
@pytest.mark.parametrize("v_head_dim", [5, 10, 13])  # narrower than queries (padded), as wide, wider
@pytest.mark.parametrize("rope", [RopeConfig(), YARN], ids=["plain", "yarn"])
@torch.no_grad()
def test_equals_the_naive_loop(q_lora_rank: int | None, v_head_dim: int, rope: RopeConfig) -> None:
    layer, hidden = build(replace(CONFIG, q_lora_rank=q_lora_rank, v_head_dim=v_head_dim, rope=rope))
    causal = torch.ones(2, 8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(layer, hidden), naive(layer, hidden, causal), rtol=1e-4, atol=1e-5)
    mask = document_mask(DOCUMENTS)
    torch.testing.assert_close(
        attend(layer, hidden, mask), naive(layer, hidden, mask[:, 0]), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_a_later_token_changes_nothing() -> None:
    layer, hidden = build(CONFIG)
    changed = hidden.clone()
    changed[:, 5] += 1
    before, after = attend(layer, hidden), attend(layer, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@torch.no_grad()
def test_documents_are_isolated() -> None:
    layer, hidden = build(CONFIG)
    mask, changed = document_mask(DOCUMENTS), hidden.clone()
    changed[0, 3] += 1  # the first token of the second document
    before, after = attend(layer, hidden, mask), attend(layer, changed, mask)
    touched = (before[0] != after[0]).any(-1).tolist()
    assert touched == [False, False, False, True, True, False, False, False]
    assert torch.equal(before[1], after[1])


def test_document_mask_is_causal_and_leaves_no_query_blind() -> None:
    mask = document_mask(DOCUMENTS)
    assert mask.shape == (2, 1, 8, 8)
    for b in range(2):
        for s in range(8):
            seen = [t for t in range(8) if mask[b, 0, s, t]]
            assert seen == [t for t in range(s + 1) if DOCUMENTS[b, t] == DOCUMENTS[b, s]]


@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_gradients_equal_the_naive_loop(q_lora_rank: int | None) -> None:
    layer, hidden = build(replace(CONFIG, q_lora_rank=q_lora_rank))
    inputs = (hidden.requires_grad_(), *layer.parameters())
    upstream = torch.randn_like(hidden)
    causal = torch.ones(2, 8, 8, dtype=torch.bool).tril()
    ours = torch.autograd.grad(attend(layer, hidden), inputs, upstream)
    theirs = torch.autograd.grad(naive(layer, hidden, causal), inputs, upstream)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


VARIANTS = [
    Variant(replace(CONFIG, num_heads=4, q_lora_rank=rank, rope=YARN), masked, recompute)
    for rank, masked, recompute in product((None, 5), (False, True), (False, True))
]


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(tp=4), Layout(cp=2), Layout(cp=4), Layout(tp=2, cp=2)],
    ids=Layout.describe,
)
def test_cut_attention_is_the_same_attention(layout: Layout) -> None:
    assert_the_same_attention(layout, VARIANTS)


def test_attention_works_while_latents_travel_and_only_they_do() -> None:
    """Every send is under way before a part of the attention and waited for after it; no key, no value."""
    config = VARIANTS[0].config
    turn = ["send", "compute", "yield", "wait"]
    rows = 2 * LENGTH // 4, config.kv_lora_rank + config.qk_rope_head_dim
    for stretch in (stretches[0] for stretches in run_ranks(4, cut_variants, Layout(cp=4), VARIANTS)):
        assert stretch.log == ["compute", *turn * 3, "compute", "compute"]
        assert stretch.sent == [rows] * 3
