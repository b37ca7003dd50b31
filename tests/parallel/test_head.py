"""The head's losses over chunks of the vocabulary against whole logits: numbers, gradients, memory."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.head import head_losses
from parallel.linear import deferring, linear
from parallel.vocab import cross_entropy
from tests.alive import Alive
from tests.ranks import run_ranks

VOCAB, WIDTH, IGNORE = 44, 6, -100


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels, and what each loss counts."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (2, 8), generator=stream)
    labels[0, 3] = labels[1, 7] = IGNORE
    labels[0, :2] = torch.tensor([0, VOCAB - 1])
    hidden = torch.randn(2, 8, WIDTH, generator=stream)
    return (
        hidden,
        9 * torch.randn(VOCAB, WIDTH, generator=stream),
        labels,
        torch.randn(2, 8, generator=stream),
    )


def whole(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and gradients of hidden states and head, with logits that are there."""
    hidden, weight, labels, shares = example()
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    losses = cross_entropy(linear(hidden, weight), labels, IGNORE, None)
    (losses * shares).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach().float(), hidden.grad.float(), weight.grad.float()


@pytest.mark.parametrize("chunk", [5, 11, 43])  # the last one is shorter, of 4 and of 1, or is not
def test_equals_whole_logits(chunk: int) -> None:
    hidden, weight, labels, shares = example()
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = head_losses(hidden, weight, labels, IGNORE, None, chunk)
    (losses * shares).sum().backward()
    assert losses[0, 3] == 0
    for found, expected in zip((losses.detach(), hidden.grad, weight.grad), whole(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_small_vocabulary_keeps_its_logits_bit_for_bit() -> None:
    hidden, weight, labels, _ = example()
    expected = cross_entropy(linear(hidden, weight), labels, IGNORE, None)
    assert torch.equal(head_losses(hidden, weight, labels, IGNORE, None, VOCAB), expected)


def on_ranks(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, shares = example()
    hidden.requires_grad_()
    part = weight.chunk(world_size)[rank].clone().requires_grad_()
    losses = head_losses(hidden, part, labels, IGNORE, dist.group.WORLD, 5)
    (losses * shares).sum().backward()
    assert hidden.grad is not None and part.grad is not None
    return losses.detach(), hidden.grad, part.grad


def test_the_vocabulary_may_be_cut_over_ranks() -> None:
    results, (losses, of_hidden, of_weight) = run_ranks(2, on_ranks), whole()
    for found, _, _ in results:
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(results[0][1] + results[1][1], of_hidden, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.cat([each[2] for each in results]), of_weight, rtol=1e-6, atol=1e-5)


def test_bf16_sums_its_gradients_in_fp32_and_puts_nothing_off() -> None:
    hidden, weight, labels, shares = example()
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    weight.main_grad = torch.ones(VOCAB, WIDTH)  # type: ignore[attr-defined]
    queue: list[object] = []
    with deferring(queue):  # type: ignore[arg-type]
        losses = head_losses(hidden, weight, labels, IGNORE, None, 5)
    (losses * shares).sum().backward()
    plain_hidden = hidden.detach().clone().requires_grad_()
    plain_weight = weight.detach().clone().requires_grad_()
    expected = cross_entropy(linear(plain_hidden, plain_weight).float(), labels, IGNORE, None)
    (expected * shares).sum().backward()
    assert queue == [] and weight.grad is None and losses.dtype == torch.float32
    assert hidden.grad is not None and plain_hidden.grad is not None and plain_weight.grad is not None
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(weight.main_grad - 1, plain_weight.grad.float(), rtol=0.01, atol=0.01)  # type: ignore[attr-defined]
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=0.02, atol=0.05)


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, weight, labels, _ = example()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    head_losses(hidden.requires_grad_(), weight, labels, IGNORE, None, 5).sum().backward()
    assert hidden.grad is not None and not weight.main_grad.any()  # type: ignore[attr-defined]


def test_whole_logits_never_exist() -> None:
    tokens, vocab, chunk = 64, 4096, 256
    hidden, weight = torch.randn(1, tokens, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    weight.main_grad = torch.zeros(vocab, 8)  # type: ignore[attr-defined]
    with Alive() as alive:
        head_losses(
            hidden, weight, torch.zeros(1, tokens, dtype=torch.int64), IGNORE, None, chunk
        ).sum().backward()
    assert alive.peak < 3 * 4 * tokens * chunk < 4 * tokens * vocab
