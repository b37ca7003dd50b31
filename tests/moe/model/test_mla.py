"""Multi-head latent attention against loops over heads and positions, what a query must not see, and the
same however heads and sequences are cut."""

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig, RopeConfig
from moe.model.mla import MultiHeadLatentAttention, document_mask
from moe.model.rope import rotation, softmax_scale
from parallel.collectives import Splits
from parallel.groups import Groups, build_groups
from parallel.layout import Layout
from parallel.pipeline.tape import Arrival, Tape, run
from parallel.sequence import Positions
from parallel.shards import Piece, parameter_pieces
from tests.ranks import run_ranks
from tests.reduced import assemble, assert_same, buffers, owned_gradients

CONFIG = ModelConfig(
    hidden_size=12, num_heads=3, kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
YARN = RopeConfig(kind="yarn", factor=4, original_context=8, mscale=0.7, mscale_all_dim=0.7)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, -1, -1]])


def build(config: ModelConfig, length: int = 8) -> tuple[MultiHeadLatentAttention, Tensor]:
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.5)
    return layer, torch.randn(2, length, config.hidden_size)


def attend(layer: MultiHeadLatentAttention, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    config = layer.config
    turn = rotation(config.rope, config.qk_rope_head_dim, torch.arange(hidden.shape[1]), hidden.device)
    return layer(hidden, turn, mask)


def rms_norm(vector: Tensor, gain: Tensor, eps: float) -> Tensor:
    return vector / (vector.square().mean() + eps).sqrt() * gain


def naive(layer: MultiHeadLatentAttention, hidden: Tensor, allowed: Tensor) -> Tensor:
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


class Variant(NamedTuple):
    q_lora_rank: int | None
    masked: bool  # by LONG_DOCUMENTS
    recompute: bool

    @property
    def config(self) -> ModelConfig:
        return replace(CONFIG, num_heads=4, q_lora_rank=self.q_lora_rank, rope=YARN)


VARIANTS = [Variant(*values) for values in product((None, 5), (False, True), (False, True))]
LONG_DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 7, [0] * 12 + [-1] * 4])  # across every stretch
LENGTH = LONG_DOCUMENTS.shape[1]


def upstream() -> Tensor:
    return torch.randn(2, LENGTH, CONFIG.hidden_size, generator=torch.Generator().manual_seed(7))


def place(layout: Layout, rank: int) -> Positions:
    at = layout.coordinates(rank)
    return Positions(length=LENGTH, cp=layout.cp, cp_rank=at["cp"], tp=layout.tp, tp_rank=at["tp"])


class Telling(Tape):
    """A tape that writes down what happens, in order."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__(recompute=recompute)
        self.log: list[str] = []
        self.sent: list[tuple[int, ...]] = []

    def compute(self, function: Any, *inputs: Any) -> Any:
        self.log.append("compute")
        return super().compute(function, *inputs)

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        self.log.append("send")
        self.sent.append(tuple(rows.shape))
        return TellingArrival(super().exchange(rows, splits), self.log)


class TellingArrival(NamedTuple):
    arrival: Arrival
    log: list[str]

    def wait(self) -> Tensor:
        self.log.append("wait")
        return self.arrival.wait()


class Stretch(NamedTuple):
    """Of one rank."""

    output: Tensor
    grad_hidden: Tensor
    owned: list[Piece]
    log: list[str]
    sent: list[tuple[int, ...]]


def cut(variant: Variant, groups: Groups) -> Stretch:
    config, positions = variant.config, place(groups.layout, groups.rank)
    whole, hidden = build(config, LENGTH)
    weights = dict(whole.named_parameters())
    layer = MultiHeadLatentAttention(config, groups)
    for piece in parameter_pieces(layer):
        piece.tensor.copy_(weights[piece.name].detach()[piece.place])
    zero, tape = buffers(layer, groups), Telling(recompute=variant.recompute)
    hidden = positions.sequence(hidden).requires_grad_()
    turn = rotation(config.rope, config.qk_rope_head_dim, positions.numbers(), hidden.device)
    documents = LONG_DOCUMENTS if variant.masked else None
    if positions.cp == 1:
        mask = None if documents is None else document_mask(documents)
        output = tape.compute(layer, hidden, turn, mask)
    else:
        phases = layer.ring_phases(tape, hidden, turn, positions, documents)
        while True:
            try:
                next(phases)
                tape.log.append("yield")
            except StopIteration as stop:
                output = stop.value
                break
    log = tape.log.copy()
    wanted = positions.sequence(upstream())
    tape.root(tape.compute(lambda value: (value * wanted).sum(), output), 1.0)
    run(tape.backward())
    tape.weights()
    assert hidden.grad is not None
    return Stretch(output.detach(), hidden.grad, owned_gradients(zero), log, tape.sent)


def cut_variants(rank: int, world_size: int, layout: Layout) -> list[Stretch]:
    groups = build_groups(layout)
    return [cut(variant, groups) for variant in VARIANTS]


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(tp=4), Layout(cp=2), Layout(cp=4), Layout(tp=2, cp=2)],
    ids=Layout.describe,
)
def test_cut_attention_is_the_same_attention(layout: Layout) -> None:
    """Output, input gradient and every weight's gradient: heads over tp, the sequence over tp and cp."""
    by_rank = run_ranks(layout.world_size, cut_variants, layout)
    for variant, *stretches in zip(VARIANTS, *by_rank, strict=True):
        layer, hidden = build(variant.config, LENGTH)
        output = attend(
            layer, hidden.requires_grad_(), document_mask(LONG_DOCUMENTS) if variant.masked else None
        )
        output.backward(upstream())
        assert hidden.grad is not None
        for rank, stretch in enumerate(stretches):
            positions = place(layout, rank)
            assert_same(stretch.output, positions.sequence(output.detach()), f"{variant}: output")
            assert_same(stretch.grad_hidden, positions.sequence(hidden.grad), f"{variant}: input gradient")
        gradients = assemble(piece for stretch in stretches for piece in stretch.owned)
        assert gradients.keys() == dict(layer.named_parameters()).keys()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.any()
            assert_same(gradients[name], parameter.grad, f"{variant}: {name}")


def test_attention_works_while_latents_travel_and_only_they_do() -> None:
    """Every send is under way before a part of the attention and waited for after it; no key, no value."""
    config = VARIANTS[0].config
    turn = ["send", "compute", "yield", "wait"]
    rows = 2 * LENGTH // 4, config.kv_lora_rank + config.qk_rope_head_dim
    for stretch in (stretches[0] for stretches in run_ranks(4, cut_variants, Layout(cp=4))):
        assert stretch.log == ["compute", *turn * 3, "compute", "compute"]
        assert stretch.sent == [rows] * 3
