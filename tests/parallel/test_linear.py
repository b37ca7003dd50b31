"""Products with weights: results, gradients, and where the weight gradient goes."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.groups import build_groups, single
from parallel.layout import Layout
from parallel.linear import GroupedLinear, Linear, Queue, by_inputs, by_outputs, deferring, linear
from parallel.shards import Cut, is_cut, parameter_pieces, pieces
from tests.ranks import run_ranks
from tests.reduced import assemble, buffers

COUNTS = (3, 0, 2, 0)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def loop(rows: Tensor, counts: tuple[int, ...], weight: Tensor) -> Tensor:
    """What a grouped product means, one expert after the other."""
    parts = rows.split(counts)
    return torch.cat([part @ weight[expert].t() for expert, part in enumerate(parts)])


def test_linear_is_the_plain_product() -> None:
    layer, rows = filled(Linear(4, 3)), torch.randn(2, 5, 4, requires_grad=True)
    upstream = torch.randn(2, 5, 3)
    ours = torch.autograd.grad(layer(rows), (rows, layer.weight), upstream)
    plain = torch.autograd.grad(F.linear(rows, layer.weight), (rows, layer.weight), upstream)
    assert torch.equal(layer(rows), F.linear(rows, layer.weight))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0, 0), (0, 0, 0, 5)])
def test_grouped_product_is_the_loop_over_experts(counts: tuple[int, ...]) -> None:
    layer, rows = filled(GroupedLinear(range(4), 6, 3)), torch.randn(sum(counts), 6, requires_grad=True)
    upstream = torch.randn(sum(counts), 3)
    result, expected = layer(rows, counts), loop(rows, counts, layer.weight)
    torch.testing.assert_close(result, expected)
    ours = torch.autograd.grad(result, (rows, layer.weight), upstream)
    plain = torch.autograd.grad(expected, (rows, layer.weight), upstream)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not ours[1][[expert for expert in range(4) if not counts[expert]]].any()


@pytest.mark.parametrize("grouped", [False, True])
def test_main_grad_equals_grad_and_adds_up(grouped: bool) -> None:
    def layer() -> torch.nn.Module:
        return filled(GroupedLinear(range(4), 6, 3) if grouped else Linear(6, 3))

    plain, buffered = layer(), layer()
    buffers(buffered, single())
    for seed in range(3):
        torch.manual_seed(seed)
        rows, upstream = torch.randn(5, 6), torch.randn(5, 3)
        for module in (plain, buffered):
            (module(rows, COUNTS) if grouped else module(rows)).backward(upstream)
    assert buffered.weight.grad is None
    torch.testing.assert_close(buffered.weight.main_grad, plain.weight.grad)


@pytest.mark.parametrize("grouped", [False, True])
def test_bf16_weights_accumulate_in_fp32(grouped: bool) -> None:
    """One part in 512 is lost in every bf16 sum after the first; fp32 keeps them all."""
    layer = (
        GroupedLinear((0,), 1, 1, torch.bfloat16) if grouped else Linear(1, 1, torch.bfloat16)
    ).requires_grad_()
    buffers(layer, single())
    for size in (1.0, *[2.0**-9] * 64):
        rows = torch.full((1, 1), size, dtype=torch.bfloat16)
        (layer(rows, (1,)) if grouped else layer(rows)).sum().backward()
    assert layer.weight.main_grad.dtype == torch.float32
    assert layer.weight.main_grad.item() == 1.0 + 64 * 2.0**-9


def test_what_needs_no_gradient_gets_none() -> None:
    layer, rows = filled(Linear(4, 3)), torch.randn(5, 4, requires_grad=True)
    buffers(layer, single())
    layer(rows.detach()).sum().backward()
    assert layer.weight.main_grad.any()
    layer.weight.main_grad.zero_()
    layer.weight.requires_grad_(False)
    layer(rows).sum().backward()
    assert rows.grad is not None and not layer.weight.main_grad.any()
    grouped = filled(GroupedLinear(range(4), 4, 3))
    buffers(grouped, single())
    grouped.weight.requires_grad_(False)
    grouped(rows, COUNTS).sum().backward()
    assert not grouped.weight.main_grad.any()


def test_a_weight_that_is_no_parameter_passes_its_gradient_on() -> None:
    weight, rows = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear(rows, weight * 2).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * rows.sum(0).expand(3, 4))


OUTPUTS, INPUTS = 8, 12


def whole_and_part(grouped: bool, cut: Cut) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A layer, and the part of it that one of `cut.count` ranks holds."""

    def layer(cut: Cut) -> torch.nn.Module:
        made = (
            GroupedLinear(range(4), INPUTS, OUTPUTS, cut=cut) if grouped else Linear(INPUTS, OUTPUTS, cut=cut)
        )
        return torch.nn.ModuleDict({"experts": filled(made)})

    whole, part = layer(Cut(dim=0, index=0, count=1)), layer(cut)
    held = {piece.name: piece.tensor for piece in parameter_pieces(whole)}
    for piece in parameter_pieces(part):
        piece.tensor.copy_(held[piece.name][piece.place])
    return whole["experts"], part["experts"]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("dim", "sections", "count"), [(0, 1, 2), (0, 2, 2), (0, 2, 4), (1, 1, 2), (1, 1, 3)]
)
def test_parts_of_a_weight_make_the_whole_product(dim: int, sections: int, count: int, grouped: bool) -> None:
    """Cut by outputs each makes its part of them, section by section; cut by inputs, a summand. Together
    their weight gradients are the whole one's, each element once."""
    rows, upstream = torch.randn(5, INPUTS, requires_grad=True), torch.randn(5, OUTPUTS)
    results, grad_rows, gradients = [], [], []
    for index in range(count):
        cut = Cut(dim=dim, index=index, count=count, sections=sections)
        whole, part = whole_and_part(grouped, cut)
        mine, wanted = rows, upstream
        if dim == 1:
            mine = rows.chunk(count, 1)[index]
        else:
            wanted = upstream.unflatten(1, (sections, count, -1))[:, :, index].flatten(1)
        results.append(part(mine, COUNTS) if grouped else part(mine))
        results[-1].backward(wanted)
        grad_rows.append(rows.grad.clone())
        rows.grad = None
        gradients += pieces("experts.weight", part.weight, part.weight.grad.flatten())
    expected = whole(rows, COUNTS) if grouped else whole(rows)
    if dim == 1:
        together = sum(results)
    else:
        together = torch.stack([result.unflatten(1, (sections, -1)) for result in results], 2).flatten(1)
    torch.testing.assert_close(together, expected)
    expected.backward(upstream)
    torch.testing.assert_close(sum(grad_rows), rows.grad)
    found = assemble(gradients)
    for piece in pieces("experts.weight", whole.weight, whole.weight.grad.flatten()):
        torch.testing.assert_close(found[piece.name], piece.tensor)


def cuts_of(rank: int, world_size: int) -> tuple[Cut, Cut]:
    groups = build_groups(Layout(tp=2, dp=2))
    return by_outputs(groups.tp, sections=2), by_inputs(groups.tp)


def test_a_group_cuts_by_rank_and_none_does_not_cut() -> None:
    for rank, (outputs, inputs) in enumerate(run_ranks(4, cuts_of)):
        assert outputs == Cut(dim=0, index=rank % 2, count=2, sections=2)
        assert inputs == Cut(dim=1, index=rank % 2, count=2)
    assert not is_cut(Linear(4, 3, cut=by_outputs(None)).weight)
    assert not is_cut(Linear(4, 3, cut=by_inputs(None)).weight)
    with pytest.raises(AssertionError, match="cannot be cut"):
        Linear(4, 6, cut=Cut(dim=0, index=0, count=2, sections=2))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_deferred_gradient_is_the_same(grouped: bool) -> None:
    at_once, later = (filled(GroupedLinear(range(4), 6, 3) if grouped else Linear(6, 3)) for _ in range(2))
    queue = Queue()
    rows, upstream = torch.randn(1, 5, 6, requires_grad=True), torch.randn(1, 5, 3)
    for layer in (at_once, later):
        buffers(layer, single())
        rows.grad = None
        with deferring(queue) if layer is later else nullcontext():
            made = layer(rows.flatten(0, 1), COUNTS).view_as(upstream) if grouped else layer(rows)
        made.backward(upstream)
        assert rows.grad is not None and rows.grad.any()
    assert not later.weight.main_grad.any() and len(queue) == 1
    queue.popleft()()
    assert at_once.weight.main_grad.any() and torch.equal(later.weight.main_grad, at_once.weight.main_grad)


@pytest.mark.parametrize("num_chosen", [1, 3, 4])
@pytest.mark.parametrize("counts", [COUNTS, (0, 2, 0, 3)])
def test_two_stacks_are_one_product(num_chosen: int, counts: tuple[int, ...]) -> None:
    """Outputs and gradients are those of all experts in one stack; a frozen stack gets none."""
    whole, parted = (filled(GroupedLinear((5, 2, 7, 0), 6, 3, num_chosen=n)) for n in (0, num_chosen))
    rest = 4 - num_chosen
    with torch.no_grad():
        parted.weight.copy_(whole.weight[:rest])
        parted.chosen.copy_(whole.weight[rest:])
    parted.weight.requires_grad_(False)
    rows, upstream = torch.randn(5, 6, requires_grad=True), torch.randn(5, 3)
    expected, result = whole(rows, counts), parted(rows, counts)
    assert torch.equal(result, expected)
    ours = torch.autograd.grad(result, (rows, parted.chosen), upstream)
    plain = torch.autograd.grad(expected, (rows, whole.weight), upstream)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1][rest:])
    names = [piece.name for piece in parameter_pieces(torch.nn.ModuleDict({"experts": parted}))]
    assert names == [f"experts.{expert}.weight" for expert in (5, 2, 7, 0)]
    with pytest.raises(AssertionError, match="5 counts for 4 experts"):
        parted(rows, (*counts, 0))
