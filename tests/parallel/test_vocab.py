"""The vocabulary cut over ranks: the whole embedding's rows, the whole logits' losses and gradients."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.vocab import VocabEmbedding, cross_entropy
from tests.ranks import run_ranks

VOCAB, WIDTH, IGNORE = 12, 6, -100


class Example(NamedTuple):
    table: Tensor
    tokens: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor  # of the losses, and of the embedded tokens


def example() -> Example:
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (2, 8), generator=stream)
    labels[0, 3] = labels[1, 7] = IGNORE
    return Example(
        torch.randn(VOCAB, WIDTH, generator=stream),
        torch.randint(VOCAB, (2, 8), generator=stream),
        30 * torch.randn(2, 8, VOCAB, generator=stream),
        labels,
        torch.randn(2, 8, generator=stream),
    )


def on_ranks(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's losses, logit gradients, stretch of embeddings, and gradient of its rows."""
    given, group = example(), dist.group.WORLD
    logits = given.logits.chunk(world_size, -1)[rank].clone().requires_grad_()
    losses = cross_entropy(logits, given.labels, IGNORE, group)
    (losses * given.weights).sum().backward()
    embedding = VocabEmbedding(VOCAB, WIDTH, group)
    embedding.weight.data.copy_(given.table.chunk(world_size)[rank])
    embedded = embedding(given.tokens)
    (embedded * given.weights.chunk(world_size, 1)[rank][..., None]).sum().backward()
    assert logits.grad is not None and embedding.weight.grad is not None
    return losses.detach(), logits.grad, embedded.detach(), embedding.weight.grad


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_the_whole_vocabulary(world_size: int) -> None:
    given = example()
    logits, table = given.logits.clone().requires_grad_(), given.table.clone().requires_grad_()
    losses = F.cross_entropy(
        logits.flatten(0, 1), given.labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(2, 8)
    (losses * given.weights).sum().backward()
    embedded = F.embedding(given.tokens, table)
    (embedded * given.weights[..., None]).sum().backward()
    results = run_ranks(world_size, on_ranks)
    for found, *_ in results:  # every rank has every loss, and backs it once
        torch.testing.assert_close(found, losses.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.cat([each[1] for each in results], -1), logits.grad)
    assert torch.equal(torch.cat([each[2] for each in results], 1), embedded)
    torch.testing.assert_close(torch.cat([each[3] for each in results]), table.grad)


def test_without_a_group_it_is_the_plain_one() -> None:
    given = example()
    losses = cross_entropy(given.logits, given.labels, IGNORE, None)
    assert losses[0, 3] == 0 and losses.shape == (2, 8)
    embedding = VocabEmbedding(VOCAB, WIDTH, None)
    embedding.weight.data.copy_(given.table)
    assert torch.equal(embedding(given.tokens), given.table[given.tokens])
