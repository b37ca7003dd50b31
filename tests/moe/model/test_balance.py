"""The selection bias in exact integers, and the auxiliary losses against loops over tokens and experts."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig
from moe.model.balance import bias_rate
from moe.model.router import Router
from parallel.collectives import Group
from parallel.pipeline.tape import Tape, run
from tests.ranks import run_ranks
from tests.reduced import assert_same

SIGMOID = ModelConfig(hidden_size=8, num_experts=8, top_k=2)
SOFTMAX = replace(SIGMOID, score_function="softmax", normalize_top_k=False)
GROUPED = replace(SOFTMAX, num_groups=4, top_groups=2, group_score="max")
LAST = torch.tensor([5, 0, 3, 12, 1, 1, 7, 3])


def build(balance: BalanceConfig, config: ModelConfig = SIGMOID, group: Group = None) -> Router:
    torch.manual_seed(0)
    router = Router(config, balance, group=group)
    torch.nn.init.normal_(router.projection.weight, std=0.5)
    return router


def updated(counts: list[int], balance: BalanceConfig | None = None, rate: float = 0.5) -> list[float]:
    router = Router(replace(SIGMOID, num_experts=len(counts)), balance or BalanceConfig())
    router.update(torch.tensor(counts), rate)
    assert router.last_counts.tolist() == counts
    return router.bias.tolist()


def test_overloaded_experts_go_down_and_the_mean_stays() -> None:
    assert updated([7, 4, 1, 4]) == [-0.5, 0.0, 0.5, 0.0]
    assert updated([3, 3, 3]) == [0.0, 0.0, 0.0]
    assert updated([0, 0, 0]) == [0.0, 0.0, 0.0]
    assert updated([2, 1, 1]) == [-0.5, 0.5, 0.5]


def test_huge_counts_are_compared_exactly() -> None:
    """One token above 10^17: no floating-point mean would see it."""
    huge = 10**17
    assert updated([huge + 1, huge, huge, huge - 1]) == [-0.5, 0.0, 0.0, 0.5]
    assert updated([huge + 1, huge, huge]) == [-0.5, 0.5, 0.5]  # the mean is no integer


def test_updates_add_up() -> None:
    router = Router(replace(SIGMOID, num_experts=2), BalanceConfig())
    for _ in range(3):
        router.update(torch.tensor([5, 1]), 1e-3)
    assert router.bias.tolist() == pytest.approx([-3e-3, 3e-3])


def test_centring_takes_the_mean_away() -> None:
    bias = updated([9, 1, 1, 1], BalanceConfig(bias_center=True))
    assert bias == pytest.approx([-0.75, 0.25, 0.25, 0.25])
    assert updated([9, 1, 1, 1]) == [-0.5, 0.5, 0.5, 0.5]  # the paper's update drifts


def test_clamp() -> None:
    assert updated([9, 1], BalanceConfig(bias_clamp=0.2)) == pytest.approx([-0.2, 0.2])


def test_a_frozen_bias_remembers_counts_only() -> None:
    assert updated([9, 1], BalanceConfig(bias_center=True), rate=0.0) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("balance", "rates"),
    [
        (BalanceConfig(bias_rate=0.1), [0.1, 0.1, 0.1, 0.1]),
        (BalanceConfig(bias_rate=0.1, bias_schedule="linear"), [0.1, 0.075, 0.05, 0.025]),
        (
            BalanceConfig(bias_rate=0.1, bias_schedule="cosine"),
            [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)],
        ),
        (BalanceConfig(bias_rate=0.1, bias_freeze_step=2), [0.1, 0.1, 0.0, 0.0]),
        (BalanceConfig(bias_rate=0.1, bias_freeze_step=0), [0.0, 0.0, 0.0, 0.0]),
        (BalanceConfig(bias="frozen", bias_rate=0.1), [0.0, 0.0, 0.0, 0.0]),
        (BalanceConfig(bias="none", bias_rate=0.1), [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_rate_over_a_run_of_four_steps(balance: BalanceConfig, rates: list[float]) -> None:
    assert [bias_rate(balance, step, 4) for step in range(4)] == pytest.approx(rates)


def test_the_bias_evens_out_a_router() -> None:
    """Not one rule but their sum: selection follows the bias, the bias follows the counts."""
    router, hidden = build(BalanceConfig()), torch.randn(8, 64, 8) + 0.7
    counts = []
    for _ in range(150):
        _, _, routing = router(hidden, torch.ones(8, 64, dtype=torch.bool))
        counts.append(routing.counts_E)
        router.update(routing.counts_E, 5e-3)
    assert counts[0].max() > 1.5 * counts[0].float().mean()
    assert counts[-1].max() < 1.1 * counts[-1].float().mean()


def reference(router: Router, hidden: Tensor, valid: Tensor) -> float:
    """5.3 of the field's definitions, token by token."""
    config, balance = router.config, router.balance
    logits = (hidden.double() @ router.projection.weight.double().t()).tolist()
    experts, width = range(config.num_experts), config.num_experts // config.num_groups
    hits: list[list[list[int]]] = []
    shares: list[list[list[float]]] = []
    for b, row in enumerate(logits):
        hits.append([])
        shares.append([])
        for s, token in enumerate(row):
            if not valid[b, s]:
                continue
            if config.score_function == "softmax":
                score = [math.exp(x) for x in token]
            else:
                score = [1 / (1 + math.exp(-x)) for x in token]
            shares[b].append([x / sum(score) for x in score])
            groups = sorted(range(config.num_groups), key=lambda g: max(score[g * width : (g + 1) * width]))
            kept = groups[-config.top_groups :] if config.score_function == "softmax" else groups
            chosen = sorted((e for e in experts if e // width in kept), key=lambda e: score[e])
            hits[b].append([int(e in chosen[-config.top_k :]) for e in experts])

    def product(hit: list[list[int]], share: list[list[float]], f: list[float] | None = None) -> float:
        tokens = len(share)
        if f is None:
            per_hit = config.num_experts / (config.top_k * tokens)
            f = [per_hit * sum(h[e] for h in hit) for e in experts]
        return sum(f[e] * sum(p[e] for p in share) / tokens for e in experts)

    flat_hits = [token for sequence in hits for token in sequence]
    flat_shares = [token for sequence in shares for token in sequence]
    by_sequence = [product(h, p) if p else 0.0 for h, p in zip(hits, shares, strict=True)]
    last = router.last_counts.tolist()
    f_last = [config.num_experts * count / sum(last) for count in last] if sum(last) else [1.0] * len(last)
    return (
        balance.sequence_aux * sum(by_sequence) / len(by_sequence)
        + balance.microbatch_aux * product(flat_hits, flat_shares)
        + balance.global_aux * product(flat_hits, flat_shares, f_last)
    )


ALL_KINDS = [
    BalanceConfig(sequence_aux=0.3),
    BalanceConfig(microbatch_aux=0.3),
    BalanceConfig(global_aux=0.3),
    BalanceConfig(sequence_aux=0.1, microbatch_aux=0.2, global_aux=0.4, bias="none"),
]
KINDS = pytest.mark.parametrize("balance", ALL_KINDS, ids=["sequence", "microbatch", "global", "all"])


def padded() -> tuple[Tensor, Tensor]:
    """Three sequences of 6, 4 and 1 real tokens."""
    hidden = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    return hidden, torch.arange(6) < torch.tensor([[6], [4], [1]])


@pytest.mark.parametrize("config", [SIGMOID, SOFTMAX, GROUPED], ids=["sigmoid", "softmax", "grouped"])
@KINDS
def test_losses_equal_the_loops(balance: BalanceConfig, config: ModelConfig) -> None:
    router, (hidden, valid) = build(balance, config), padded()
    router.bias.copy_(torch.linspace(-1, 1, 8))  # hits are counted without it
    for last in (torch.zeros(8, dtype=torch.int64), LAST):
        router.last_counts.copy_(last)
        loss = router(hidden, valid)[1]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(reference(router, hidden, valid), rel=1e-5)


@KINDS
def test_padding_changes_no_loss_and_gets_no_gradient(balance: BalanceConfig) -> None:
    router, (hidden, valid) = build(balance), padded()
    router.last_counts.copy_(LAST)
    other = torch.where(valid[..., None], hidden, 100.0)
    assert router(hidden, valid)[1].item() == pytest.approx(router(other, valid)[1].item())
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(router(hidden, valid)[1], hidden)
    assert not gradient[~valid].any() and gradient[valid].any(-1).all()


@pytest.mark.parametrize("kind", ["microbatch_aux", "global_aux"])
def test_a_sequence_of_padding_dilutes_no_mean_over_tokens(kind: str) -> None:
    router, (hidden, valid) = build(BalanceConfig(**{kind: 1.0})), padded()
    alone = router(hidden[:1], valid[:1])[1].item()
    valid[1:] = False
    assert router(hidden, valid)[1].item() == pytest.approx(alone, rel=1e-5)


def test_nothing_but_padding_is_finite() -> None:
    router, hidden = build(ALL_KINDS[-1]), torch.randn(2, 3, 8)
    router.last_counts.copy_(LAST)
    assert router(hidden, torch.zeros(2, 3, dtype=torch.bool))[1].item() == 0.0


def test_even_load_costs_the_coefficient() -> None:
    """sum f P = 1 where load is even, and the loss is switched off by zeros."""
    router, (hidden, valid) = build(BalanceConfig(sequence_aux=0.3)), padded()
    router.projection.weight.data.zero_()
    assert router(hidden, valid)[1].item() == pytest.approx(0.3)
    loss = build(BalanceConfig())(hidden, valid)[1]
    assert loss.item() == 0.0 and not loss.requires_grad


def loss_and_gradients(
    balance: BalanceConfig, config: ModelConfig, rank: int = 0, ranks: int = 1
) -> tuple[float, Tensor, Tensor]:
    """The loss of a stretch of the padded sequences, and its gradients to router and hidden states."""
    router = build(balance, config, dist.group.WORLD if ranks > 1 else None)
    router.last_counts.copy_(LAST)
    hidden, valid = (each.chunk(ranks, 1)[rank] for each in padded())
    hidden = hidden.clone().requires_grad_()
    loss = router(hidden, valid)[1]
    loss.backward()
    assert router.projection.weight.grad is not None and hidden.grad is not None
    return loss.item(), router.projection.weight.grad, hidden.grad


def cut_sequences(rank: int, world_size: int) -> list[tuple[float, Tensor, Tensor]]:
    return [loss_and_gradients(*each, rank, world_size) for each in CUT]


CUT = [(balance, config) for balance in ALL_KINDS for config in (SIGMOID, GROUPED)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_over_cut_sequences_losses_and_gradients_add_up(ranks: int) -> None:
    """Field class 2.4: shares of a stretch's own counts, or of counts summed twice (Megatron #7452)."""
    for which, *parts in zip(CUT, *run_ranks(ranks, cut_sequences), strict=True):
        loss, to_router, to_hidden = loss_and_gradients(*which)
        losses, router_parts, hidden_parts = zip(*parts, strict=True)
        assert sum(losses) == pytest.approx(loss, rel=1e-6)
        assert_same(sum(router_parts), to_router, f"{which}: router")
        assert_same(torch.cat(hidden_parts, 1), to_hidden, f"{which}: hidden states")


def gradient(balance: BalanceConfig, pieces: int, *, recompute: bool = False) -> tuple[Tensor, float]:
    """The router's gradient over four sequences in `pieces` microbatches, and the mean loss."""
    router, hidden = build(balance), torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
    router.last_counts.copy_(LAST)
    total = 0.0
    for part in hidden.chunk(pieces):
        tape = Tape(recompute=recompute)
        loss = tape.compute(router, part, torch.ones(part.shape[:2], dtype=torch.bool))[1]
        tape.root(loss, 1 / pieces)
        total += loss.item() / pieces
        run(tape.backward())
    assert router.projection.weight.grad is not None
    return router.projection.weight.grad, total


@pytest.mark.parametrize("kind", ["sequence_aux", "global_aux"])
def test_gradient_does_not_depend_on_the_number_of_microbatches(kind: str) -> None:
    """The microbatch loss does by definition: its f is the microbatch's own."""
    balance = BalanceConfig(**{kind: 1.0})
    (whole, loss), (parts, same) = gradient(balance, 1), gradient(balance, 4)
    assert whole.any() and same == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


@KINDS
def test_recomputation_doubles_neither_loss_nor_gradient(balance: BalanceConfig) -> None:
    once, twice = gradient(balance, 2), gradient(balance, 2, recompute=True)
    assert torch.equal(once[0], twice[0]) and once[1] == twice[1]


def test_the_loss_pulls_towards_even_load() -> None:
    router, hidden = build(BalanceConfig(bias="none", microbatch_aux=1.0)), torch.randn(8, 32, 8) + 0.7
    valid = torch.ones(8, 32, dtype=torch.bool)
    first = router(hidden, valid)[2].counts_E
    for _ in range(100):
        loss = router(hidden, valid)[1]
        (step,) = torch.autograd.grad(loss, router.projection.weight)
        router.projection.weight.data.sub_(step)
    assert router(hidden, valid)[2].counts_E.max() < 0.7 * first.max()
