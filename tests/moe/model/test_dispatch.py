"""Which rows go where: order, padding, capacity, delivery, and gradients against plain indexing."""

import math

import pytest
import torch
from torch import Tensor

from moe.model.dispatch import Plan, announce, deliver, make_plan, within_capacity
from parallel.collectives import ALONE, ModelGroups, Splits, all_to_all, group_rank
from parallel.grouped import sum_rows, take_rows
from parallel.groups import build_groups
from parallel.layout import Layout
from tests.ranks import run_ranks

NUM_EXPERTS, TOP_K = 8, 3


def choice(seed: int, num_tokens: int = 20, favourites: int = NUM_EXPERTS) -> tuple[Tensor, Tensor]:
    """Distinct experts [T, K] (every fifth token padding) and weights [T, K]."""
    stream = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=stream)
    scores[:, favourites:] -= 2
    chosen = scores.topk(TOP_K).indices
    chosen[::5] = NUM_EXPERTS
    return chosen, torch.rand(num_tokens, TOP_K, generator=stream)


def check(plan: Plan, chosen: Tensor) -> None:
    """A plan's three parts tell the same story."""
    experts = chosen.flatten()[plan.order_N]
    assert experts.tolist() == sorted(experts.tolist())
    assert plan.rows_E.tolist() == [(experts == expert).sum().item() for expert in range(NUM_EXPERTS)]
    slots = plan.slot_TK.flatten()
    assert slots[plan.order_N].tolist() == list(range(len(plan.order_N)))
    assert (slots >= 0).sum() == len(plan.order_N)
    assert torch.equal(plan.token_N, plan.order_N // TOP_K)


def test_every_assignment_has_a_row_in_expert_order_and_padding_none() -> None:
    chosen, _ = choice(0)
    plan = make_plan(chosen, NUM_EXPERTS)
    check(plan, chosen)
    assert torch.equal(plan.slot_TK == -1, chosen == NUM_EXPERTS)
    for expert in range(NUM_EXPERTS):  # within an expert, rows stand in token order
        tokens = plan.token_N[chosen.flatten()[plan.order_N] == expert].tolist()
        assert tokens == sorted(tokens)


def test_nothing_but_padding() -> None:
    nowhere = torch.full((4, TOP_K), NUM_EXPERTS)
    plan = make_plan(within_capacity(nowhere, torch.rand(4, TOP_K), NUM_EXPERTS, 1.0), NUM_EXPERTS)
    assert not plan.rows_E.any() and len(plan.order_N) == 0 and (plan.slot_TK == -1).all()
    rows = sum_rows(torch.zeros(0, 5, requires_grad=True), plan.order)
    assert rows.shape == (4, 5) and not rows.any()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 100.0])
def test_capacity_keeps_the_heaviest_rows_of_each_expert(factor: float) -> None:
    chosen, weights = choice(1, favourites=4)
    plan = make_plan(within_capacity(chosen, weights, NUM_EXPERTS, factor), NUM_EXPERTS)
    check(plan, chosen)
    valid = (chosen[:, 0] < NUM_EXPERTS).sum().item()
    capacity = math.ceil(factor * valid * TOP_K / NUM_EXPERTS)
    for expert in range(NUM_EXPERTS):
        asked = [(weights[t, k].item(), t, k) for t, k in (chosen == expert).nonzero().tolist()]
        kept = {(t, k) for _, t, k in sorted(asked, reverse=True)[:capacity]}
        assert {
            tuple(place) for place in ((chosen == expert) & (plan.slot_TK >= 0)).nonzero().tolist()
        } == kept
    dropped = ((plan.slot_TK < 0) & (chosen < NUM_EXPERTS)).sum()
    assert dropped + plan.rows_E.sum() == valid * TOP_K
    assert bool(dropped) == (factor < 2)


@pytest.mark.parametrize("padded", [False, True])
def test_spread_and_combine_equal_plain_indexing(padded: bool) -> None:
    torch.manual_seed(0)
    chosen, weights = choice(2)
    if not padded:
        chosen, weights = chosen[1:5], weights[1:5]
    num_tokens = len(chosen)
    hidden = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    kept = within_capacity(chosen, weights, NUM_EXPERTS, 1.0) if padded else chosen
    plan = make_plan(kept, NUM_EXPERTS)
    scale = torch.linspace(1, 2, len(plan.order_N), dtype=torch.float64)[:, None]  # stands for the experts

    def ours() -> Tensor:
        return sum_rows(take_rows(hidden, plan.order) * scale, plan.order)

    def plain() -> Tensor:
        out = []
        for t in range(num_tokens):
            rows = [hidden[t] * scale[s] for s in plan.slot_TK[t].tolist() if s >= 0]
            out.append(sum(rows, torch.zeros(6, dtype=torch.float64)))
        return torch.stack(out)

    torch.testing.assert_close(ours(), plain())
    upstream = torch.randn(num_tokens, 6, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(made, hidden, upstream)[0] for made in (ours(), plain()))
    torch.testing.assert_close(mine, theirs)


def route_home(chosen: Tensor, groups: ModelGroups) -> tuple[Tensor, Plan]:
    """Rows [token, expert] through dispatch to the experts and back; what came back, in sending order."""
    plan = make_plan(chosen, NUM_EXPERTS)
    delivery = deliver(plan, announce(plan, groups).wait(), groups)
    rows = torch.stack((plan.token_N, chosen.flatten()[plan.order_N]), 1)
    arrived = all_to_all(rows, delivery.splits)
    assert (delivery.shared is None) == (groups.etp is None)
    shared = delivery.shared or Splits((len(arrived),), (len(arrived),), None)
    gathered = all_to_all(arrived.repeat(len(shared.send), 1), shared)
    in_order = take_rows(gathered, delivery.order)
    begin, first = 0, group_rank(groups.ep) * len(delivery.counts)
    for local, count in enumerate(delivery.counts):
        assert (in_order[begin : begin + count, 1] == first + local).all()
        begin += count
    assert begin == len(gathered)
    home = sum_rows(in_order, delivery.order)
    assert torch.equal(home, gathered)
    summands = all_to_all(home, shared.reversed()).unflatten(0, (len(shared.send), -1))
    assert all(torch.equal(summand, arrived) for summand in summands)
    return all_to_all(summands[0], delivery.splits.reversed()), plan


def deliver_everywhere(rank: int, world_size: int, layout: Layout, favourites: int) -> tuple[int, int]:
    chosen, _ = choice(rank, favourites=favourites)
    if rank == world_size - 1:
        chosen.fill_(NUM_EXPERTS)  # a rank that sends nothing
    back, plan = route_home(chosen, build_groups(layout))
    sent = torch.stack((plan.token_N, chosen.flatten()[plan.order_N]), 1)
    assert torch.equal(back, sent)
    return len(sent), int((chosen < NUM_EXPERTS).sum())


@pytest.mark.parametrize(
    ("layout", "favourites"),
    [
        (Layout(dp=2, ep=2), 8),
        (Layout(dp=4, ep=4), 8),
        (Layout(dp=8, ep=8), 8),
        (Layout(dp=4, ep=4), 3),
        (Layout(dp=4, ep=2), 8),
        (Layout(dp=4, ep=2, etp=2), 8),
        (Layout(dp=4, ep=2, etp=2), 3),
        (Layout(dp=4, etp=4), 8),
    ],
    ids=lambda value: value.describe() if isinstance(value, Layout) else value,
)
def test_rows_meet_their_experts_and_come_home(layout: Layout, favourites: int) -> None:
    """With three favourites of eight over four ranks, two ranks receive nothing; with eight, e = 1. The
    ranks that hold parts of the same experts all see the rows of all of them."""
    for rank, (sent, asked) in enumerate(
        run_ranks(layout.world_size, deliver_everywhere, layout, favourites)
    ):
        assert sent == asked and bool(sent) == (rank < layout.world_size - 1)


def test_alone_every_row_is_at_home() -> None:
    chosen, _ = choice(0)
    back, plan = route_home(chosen, ALONE)
    assert torch.equal(back[:, 0], plan.token_N)
