"""Every gate against a loop written from the definitions, one token and one expert at a time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig
from moe.model.router import Router

V3 = ModelConfig(
    hidden_size=16, num_experts=16, num_groups=4, top_groups=2, top_k=3, routed_scaling_factor=2.5
)
V2 = replace(
    V3, score_function="softmax", group_score="max", normalize_top_k=False, routed_scaling_factor=16.0
)
LITE = replace(V2, num_groups=1, top_groups=1)
NO_BIAS = BalanceConfig(bias="none")
UNEVEN = torch.linspace(-0.4, 0.4, 16).roll(5)
NEGATIVE = UNEVEN - 3  # every score + bias below zero, even a sigmoid's


def build(config: ModelConfig, balance: BalanceConfig, bias: Tensor) -> Router:
    torch.manual_seed(0)
    router = Router(config, balance)
    torch.nn.init.normal_(router.projection.weight, std=0.4)
    router.bias.copy_(bias)
    return router


def gate(config: ModelConfig, logits: list[float], bias: list[float]) -> dict[int, float]:
    """The chosen experts of one token with their weights (5.1 of the field's definitions)."""
    if config.score_function == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    width = config.num_experts // config.num_groups
    groups = [range(g * width, (g + 1) * width) for g in range(config.num_groups)]

    def group_score(group: range) -> float:
        best = sorted((choice[e] for e in group), reverse=True)
        return best[0] if config.group_score == "max" else best[0] + best[1]

    kept = sorted(groups, key=group_score, reverse=True)[: config.top_groups]
    candidates = [expert for group in kept for expert in group]
    chosen = sorted(candidates, key=lambda e: choice[e], reverse=True)[: config.top_k]
    weights = {e: scores[e] for e in chosen}
    if config.normalize_top_k:
        total = sum(weights.values()) + 1e-20
        weights = {e: w / total for e, w in weights.items()}
        if config.score_function == "softmax":
            return weights  # V2 scales only what it does not normalise
    return {e: w * config.routed_scaling_factor for e, w in weights.items()}


@pytest.mark.parametrize(
    ("config", "balance", "bias"),
    [
        pytest.param(LITE, NO_BIAS, UNEVEN, id="V2-Lite-greedy"),
        pytest.param(V2, NO_BIAS, UNEVEN, id="V2-best-groups-by-max"),
        pytest.param(replace(V2, normalize_top_k=True), NO_BIAS, UNEVEN, id="V2-normalised-is-not-scaled"),
        pytest.param(V2, BalanceConfig(), UNEVEN / 20, id="bias-on-softmax"),
        pytest.param(V2, BalanceConfig(), NEGATIVE, id="bias-on-softmax-below-zero"),
        pytest.param(V3, BalanceConfig(), torch.zeros(16), id="V3-without-bias"),
        pytest.param(V3, BalanceConfig(), UNEVEN, id="V3"),
        pytest.param(V3, BalanceConfig(), NEGATIVE, id="V3-below-zero-needs-minus-infinity"),
        pytest.param(V3, BalanceConfig(bias="frozen"), UNEVEN, id="V3-frozen-bias-still-chooses"),
        pytest.param(replace(V3, normalize_top_k=False), BalanceConfig(), UNEVEN, id="V3-not-normalised"),
        pytest.param(replace(V3, group_score="max"), BalanceConfig(), UNEVEN, id="sigmoid-by-max"),
    ],
)
def test_gate_equals_the_loop(config: ModelConfig, balance: BalanceConfig, bias: Tensor) -> None:
    router = build(config, balance, bias)
    hidden, valid = torch.randn(5, 12, 16), torch.ones(5, 12, dtype=torch.bool)
    weights, _, routing = router(hidden, valid)
    assert weights.dtype == torch.float32
    logits = (hidden.flatten(0, 1).double() @ router.projection.weight.double().t()).tolist()
    used = bias if balance.bias != "none" else torch.zeros(16)
    differs = 0
    for t, token in enumerate(logits):
        expected = gate(config, token, used.double().tolist())
        found = dict(zip(routing.experts_TK[t].tolist(), weights[t].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5)
        differs += expected.keys() != gate(config, token, [0.0] * 16).keys()
    assert bool(differs) == bool((used != used[0]).any())  # an even bias changes nothing, another does


@pytest.mark.parametrize("config", [LITE, V2, V3])
def test_counts_are_valid_tokens_times_k_and_padding_is_never_routed(config: ModelConfig) -> None:
    router, valid = build(config, BalanceConfig(), UNEVEN), torch.ones(3, 7, dtype=torch.bool)
    valid[0, 4:] = valid[2] = False
    _, _, routing = router(torch.randn(3, 7, 16), valid)
    assert routing.counts_E.dtype == torch.int64
    assert routing.counts_E.sum() == valid.sum() * config.top_k
    assert (routing.experts_TK[~valid.flatten()] == config.num_experts).all()
    assert (routing.experts_TK[valid.flatten()] < config.num_experts).all()
    for expert in range(config.num_experts):
        assert routing.counts_E[expert] == (routing.experts_TK == expert).sum()


def test_weights_pass_gradients_to_the_scores_and_none_to_the_bias() -> None:
    router = build(V3, BalanceConfig(), UNEVEN)
    router.bias.requires_grad_()
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    weights, _, routing = router(hidden, torch.ones(2, 5, dtype=torch.bool))
    upstream = torch.randn_like(weights)
    weights.backward(upstream)
    assert router.bias.grad is None
    leaf = hidden.detach().flatten(0, 1).requires_grad_()
    scores = (leaf @ router.projection.weight.detach().t()).sigmoid().gather(1, routing.experts_TK)
    (scores / scores.sum(-1, keepdim=True) * 2.5).backward(upstream)
    assert hidden.grad is not None and leaf.grad is not None
    torch.testing.assert_close(hidden.grad.flatten(0, 1), leaf.grad)
    assert router.projection.weight.grad is not None and router.projection.weight.grad.any()


def test_routing_is_fp32_and_leaves_no_trace() -> None:
    """bf16 weights and inputs are widened before the product; a forward changes no buffer."""
    router = build(V3, BalanceConfig(), UNEVEN).to(torch.bfloat16)
    hidden, valid = torch.randn(4, 8, 16).bfloat16(), torch.ones(4, 8, dtype=torch.bool)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    weights, _, routing = router(hidden, valid)
    wide = build(V3, BalanceConfig(), UNEVEN)
    wide.projection.weight.data.copy_(router.projection.weight)
    expected, _, same = wide(hidden.float(), valid)
    assert torch.equal(weights, expected) and torch.equal(routing.experts_TK, same.experts_TK)
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    assert set(before) == {"bias", "last_counts", "projection.weight"}  # both are saved with the model


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_a_model_keeps_the_bias_in_fp32(cast: str) -> None:
    exact = torch.full((16,), 5.0) + torch.arange(16) * 1e-5  # lost in any narrower type
    outer = torch.nn.Sequential(build(V3, BalanceConfig(), exact))
    router = getattr(outer, cast)()[0]
    assert isinstance(router, Router)
    assert router.bias.dtype == torch.float32 and torch.equal(router.bias, exact)
    assert router.last_counts.dtype == torch.int64
    assert router.projection.weight.dtype == getattr(torch, cast)
    assert torch.equal(router.to("cpu").bias, exact)


def test_unbiased_choice_counts_as_each_report_does() -> None:
    """V3's losses count the top-k of bare scores over all experts, V2's the selection within the groups."""
    scores = torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(3))
    bare = build(V3, BalanceConfig(), NEGATIVE * UNEVEN).unbiased_choice(scores)
    assert torch.equal(bare.sort(-1).values, scores.topk(3).indices.sort(-1).values)
    limited = build(V2, BalanceConfig(), UNEVEN).unbiased_choice(scores)
    for b in range(2):
        for s in range(6):
            best = sorted(range(4), key=lambda g: scores[b, s, 4 * g : 4 * g + 4].max().item())[-2:]
            allowed = [e for e in range(16) if e // 4 in best]
            expected = sorted(allowed, key=lambda e: scores[b, s, e].item())[-3:]
            assert sorted(limited[b, s].tolist()) == sorted(expected)


@pytest.mark.parametrize("config", [LITE, V2, V3, replace(V3, top_groups=1, top_k=4)])
def test_signals_are_those_of_valid_tokens(config: ModelConfig) -> None:
    """Logit scale, margin and what the group limit moved, one token at a time."""
    router = build(config, BalanceConfig(), UNEVEN)
    hidden = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1)) * 2
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    signals = router(hidden, valid)[2].signals
    logits = (hidden.flatten(0, 1) @ router.projection.weight.T)[valid.flatten()]
    squares, margins, moved = 0.0, [], 0
    unlimited = replace(config, num_groups=1, top_groups=1)
    for row in logits.tolist():
        squares += sum(x * x for x in row) / len(row)
        chosen = set(gate(config, row, UNEVEN.tolist()))
        moved += len(set(gate(unlimited, row, UNEVEN.tolist())) - chosen)
        # What comes next is what the next greater choice adds; with one group kept there is nothing to add.
        wider = replace(config, top_k=config.top_k + 1)
        scores = (
            torch.tensor(row).softmax(-1)
            if config.score_function == "softmax"
            else torch.tensor(row).sigmoid()
        )
        choice = (scores + UNEVEN).tolist()
        rest = set(gate(wider, row, UNEVEN.tolist())) - chosen
        margins += [min(choice[e] for e in chosen) - choice[e] for e in rest]
    assert bool(margins) == (config.top_groups > 1 or config.num_groups == 1)
    expected = torch.tensor([squares, sum(margins), len(margins), moved], dtype=torch.float64)
    torch.testing.assert_close(signals.sums, expected, rtol=1e-5, atol=1e-6)
    assert signals.logit_max == pytest.approx(logits.abs().max().item())
    assert moved > 0 or config.num_groups == 1
