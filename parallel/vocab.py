"""The vocabulary cut over tensor-parallel ranks: embedding, and cross entropy without whole logits.

Each rank holds V / tp rows of embedding and head. A token's embedding comes from the one rank that has
its row; the loss needs three numbers per token from all ranks: the greatest logit, the sum of
exponentials, and the label's logit.
Legend: B sequences, S positions, s positions of this rank, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import Group, all_reduce, group_rank, group_size, scatter_sum
from parallel.linear import by_outputs
from parallel.shards import mark_cut


class VocabEmbedding(nn.Module):
    """Rows [V / tp, D] of the embedding."""

    def __init__(
        self, vocab_size: int, hidden_size: int, group: Group, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(vocab_size // group_size(group), hidden_size, dtype=dtype))
        mark_cut(self.weight, by_outputs(group))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S], the same on every rank -> this rank's stretch [B, s, D] of the sequence."""
        if self.group is None:
            return F.embedding(tokens, self.weight)
        rows = tokens - group_rank(self.group) * self.weight.shape[0]
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        found = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return scatter_sum(found.masked_fill(elsewhere[..., None], 0), self.group)


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int, group: Group) -> Tensor:
    """Losses [B, S] in fp32 of logits [B, S, V / tp] in fp32; 0 where the label [B, S] is `ignore`."""
    if group is None:
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignore, reduction="none")
        return flat.view_as(labels)
    return _CrossEntropy.apply(logits, labels, ignore, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore: int, group: dist.ProcessGroup) -> Tensor:
        greatest = all_reduce(logits.amax(-1), group, op=dist.ReduceOp.MAX)
        shifted = logits - greatest[..., None]
        row = labels - group_rank(group) * logits.shape[-1]
        elsewhere = (row < 0) | (row >= logits.shape[-1]) | (labels == ignore)
        row = row.masked_fill(elsewhere, 0)[..., None]
        of_label = shifted.gather(-1, row)[..., 0].masked_fill(elsewhere, 0.0)
        exponentials = shifted.exp_()
        total, of_label = all_reduce(torch.stack((exponentials.sum(-1), of_label)), group)
        ctx.save_for_backward(exponentials.div_(total[..., None]), row, elsewhere, labels == ignore)
        return (total.log() - of_label).masked_fill(labels == ignore, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, row, elsewhere, ignored = ctx.saved_tensors
        grad = grads[0].masked_fill(ignored, 0.0)[..., None]
        grad_logits = softmax * grad
        grad_logits.scatter_add_(-1, row, -grad.masked_fill(elsewhere[..., None], 0.0))
        return grad_logits, None, None, None
