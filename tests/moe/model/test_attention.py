"""Attention in parts against attention at once: values, gradients, memory, and the work that is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moe.model import attention
from moe.model.attention import attend, merge, partial_attention
from parallel.sequence import Positions

SCALE = 0.4
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 8 + [2], [0] * 3 + [1] * 10 + [-1] * 3], dtype=torch.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 3)


def draw(
    queries: int = 16, keys: int | None = None, *, width: int = 6, v_width: int = 5, batch: int = 2
) -> list[Tensor]:
    """Query, key and value of 3 heads, leaves in fp64."""
    torch.manual_seed(0)
    keys = queries if keys is None else keys
    shapes = ((queries, width), (keys, width), (keys, v_width))
    return [torch.randn(batch, s, 3, w, dtype=torch.float64, requires_grad=True) for s, w in shapes]


def single(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().float().requires_grad_() for tensor in tensors]


def at_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition; `mask` [B or 1, 1, Q, K]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhv->bqhv", scores.softmax(-1), value)


def causal_mask(documents: Tensor | None) -> Tensor:
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    if documents is None:
        return mask
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.detach().double() - expected.detach()).norm() / expected.detach().norm())


def assert_near(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert relative_error(ours, expected) < 1e-6


def assert_all_near(out: Tensor, inputs: list[Tensor], expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients; the expected ones are in fp64."""
    assert_near(out, expected)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert_near(mine, theirs)


@pytest.mark.parametrize("v_width", [4, 6, 9])  # narrower than queries (padded), as wide, wider
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_attend(v_width: int, documents: Tensor | None) -> None:
    leaves = draw(v_width=v_width)
    mask = causal_mask(documents)
    inputs = single(leaves)
    out = attend(*inputs, SCALE, None if documents is None else mask)
    assert_all_near(out, inputs, at_once(*leaves, mask), leaves)


@pytest.mark.parametrize("split", [(11,), (4, 7), (1, 1, 9), (2, 3, 5, 1)], ids=str)
@pytest.mark.parametrize("v_width", [5, 9])
def test_parts_over_any_split_of_the_keys_merge_to_the_whole(split: tuple[int, ...], v_width: int) -> None:
    leaves = draw(queries=7, keys=11, v_width=v_width)
    inputs = query, key, value = single(leaves)
    parts: list[Tensor] = []
    for keys, values in zip(key.split(split, 1), value.split(split, 1), strict=True):
        parts += partial_attention(query, keys, values, SCALE, causal=False)
    assert_all_near(merge(*parts), inputs, at_once(*leaves), leaves)


def test_the_lse_is_the_log_of_the_denominator() -> None:
    query, key, value = single(draw(queries=7, keys=11))
    out, lse = partial_attention(query, key, value, SCALE, causal=False)
    scores = torch.einsum("bqhd,bkhd->bqhk", query.double(), key.double()) * SCALE
    assert (out.shape, lse.shape, lse.dtype) == ((2, 7, 3, 5), (2, 7, 3), torch.float32)
    assert_near(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [True, False])
def test_gradients_through_both_outputs(causal: bool, with_documents: bool) -> None:
    leaves = draw(queries=5, keys=5 if causal else 4, width=3, v_width=2)
    of_queries = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    of_keys = of_queries if causal else torch.tensor([[0, 1, 1, 0], [0, 1, 2, 2]])
    documents = (of_queries, of_keys) if with_documents else None

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return partial_attention(*inputs, SCALE, causal=causal, documents=documents)

    assert torch.autograd.gradcheck(both, leaves)


def ring(inputs: list[Tensor], cp: int, rank: int, documents: Tensor | None = None) -> Tensor:
    """What context rank `rank` makes of whole queries, keys and values: [B, S / cp, H, V]."""
    here = Positions(length=inputs[0].shape[1], cp=cp, cp_rank=rank)
    parts: list[Tensor] = []
    for turn in range(cp):
        there = replace(here, cp_rank=(rank - turn) % cp)
        sight = here.sight(there.cp_rank)
        query, key, value = (place.context(x) for place, x in zip((here, there, there), inputs, strict=True))
        numbers = None
        if documents is not None:
            numbers = here.context(documents)[:, sight.queries], there.context(documents)[:, sight.keys]
        parts += partial_attention(
            query[:, sight.queries],
            key[:, sight.keys],
            value[:, sight.keys],
            SCALE,
            causal=sight.causal,
            documents=numbers,
        )
    return merge(*parts)


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_zig_zag_equals_causal_attention(cp: int, documents: Tensor | None) -> None:
    leaves = draw()
    expected = at_once(*leaves, causal_mask(documents))
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    inputs = single(leaves)
    gradients = [torch.zeros_like(tensor) for tensor in inputs]
    for rank in range(cp):
        here = Positions(length=16, cp=cp, cp_rank=rank)
        out = ring(inputs, cp, rank, documents)
        assert_near(out, here.context(expected))
        for total, part in zip(
            gradients, torch.autograd.grad(out, inputs, here.context(upstream).float()), strict=True
        ):
            total += part
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert_near(mine, theirs)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_ranks_share_the_work_evenly_and_none_is_in_vain(cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, length = 4, 64
    monkeypatch.setattr(attention, "BLOCK", block)
    held = length // cp
    causal = held * (held + block) // 2  # what a query may see, and the rest of each diagonal block
    others = (cp - 1) * held * held // 2
    inputs = single(draw(length))
    for rank in range(cp):
        with FlopCounterMode(display=False) as forward:
            out = ring(inputs, cp, rank)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        heads, width, v_width = 2 * 3, 6, 5
        scores = heads * (causal + others)
        assert forward.get_total_flops() == 2 * scores * (width + v_width)
        assert backward.get_total_flops() == 2 * scores * (3 * width + 2 * v_width)
    assert cp * (causal + others) == length * (length + block) // 2  # together as much as one alone


def test_a_query_that_sees_nothing_stays_finite() -> None:
    inputs = query, key, value = single(draw(queries=6))
    of_queries, of_keys = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    out, lse = partial_attention(query, key, value, SCALE, causal=False, documents=(of_queries, of_keys))
    assert bool((out[:, 4:] == 0).all()) and bool((lse[:, 4:] == -torch.inf).all())
    assert bool(lse[:, :4].isfinite().all()) and bool((out[:, :4] != 0).all())
    gradients = torch.autograd.grad((out, lse), inputs, (torch.randn_like(out), torch.randn_like(lse)))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool((gradients[0][:, 4:] == 0).all()) and bool((gradients[0][:, :4] != 0).all())


def test_merging_queries_that_a_part_or_every_part_leaves_blind() -> None:
    leaves = draw(queries=6)
    of_queries, of_keys = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), torch.tensor([[0, 1, 0, 1, 1, 1]] * 2)
    mask = of_queries[:, None, :, None] == of_keys[:, None, None, :]
    expected = at_once(*leaves, mask | (of_queries == 2)[:, None, :, None])
    expected = expected * (of_queries != 2)[..., None, None]
    inputs = query, key, value = single(leaves)
    parts: list[Tensor] = []
    for keys in (slice(0, 3), slice(3, 6)):  # document 0 stands in the first part only, 2 in none
        parts += partial_attention(
            query, key[:, keys], value[:, keys], SCALE, causal=False, documents=(of_queries, of_keys[:, keys])
        )
    assert_all_near(merge(*parts), inputs, expected, leaves)


def test_bf16_stays_near_the_kernel() -> None:
    leaves = draw(64, width=16, v_width=16)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in half]
    expected = at_once(*exact, torch.ones(64, 64, dtype=torch.bool).tril())
    upstream = torch.randn_like(expected).bfloat16()
    wanted = (expected, *torch.autograd.grad(expected, exact, upstream.double()))

    def errors(out: Tensor) -> list[float]:
        assert out.dtype == torch.bfloat16
        found = (out, *torch.autograd.grad(out, half, upstream))
        return [relative_error(*pair) for pair in zip(found, wanted, strict=True)]

    def zig_zag() -> Tensor:
        merged = [ring(half, 2, rank) for rank in range(2)]
        order = torch.cat([Positions(length=64, cp=2, cp_rank=rank).numbers() for rank in range(2)])
        return torch.cat(merged, 1)[:, order.argsort()]

    whole = partial_attention(*half, SCALE, causal=True)
    assert whole[1].dtype == torch.float32
    kernel = errors(attend(*half, SCALE))
    for ours in (errors(whole[0]), errors(zig_zag())):
        # Unlike the kernel's, a product that scores or their gradients come from is rounded to bf16.
        assert all(mine < 3 * theirs < 0.01 for mine, theirs in zip(ours, kernel, strict=True))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@contextmanager
def saved_shapes() -> Iterator[list[tuple[int, ...]]]:
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes


@pytest.mark.parametrize("causal", [True, False])
def test_no_matrix_of_scores_is_kept_or_ever_whole(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # blocks as large as in use
    leaves = single(draw(2048, batch=1))
    with LargestTensor() as forward, saved_shapes() as shapes:
        out, lse = partial_attention(*leaves, SCALE, causal=causal)
    inputs = [tuple(leaf.shape) for leaf in leaves]
    assert sorted(shapes) == sorted([*inputs, tuple(out.shape), tuple(lse.shape)])
    with LargestTensor() as backward:
        (out.sum() + lse.sum()).backward()
    assert max(forward.elements, backward.elements) == 3 * attention.BLOCK * 2048
