"""The head and its cross entropy over chunks of the vocabulary: whole logits never exist.

The forward walks the chunks with a running maximum m and a running sum of exponentials z (1805.02867); the
backward makes each chunk's logits again, from them softmax - label, and at once both gradients. That is one
product in four more for the head, and T x chunk numbers in place of T x V. A chunk holds all tokens: a
part of the weight is then read, and its gradient added, once. For the same reason weight gradients are
not put off as other products' are: what they are made of would be whole logits. A vocabulary that is no
larger than a chunk keeps its logits, and nothing is made twice.
Legend: B sequences, S positions, T tokens, D hidden size, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Group, all_reduce, group_rank
from parallel.linear import add_weight_gradient, linear
from parallel.vocab import cross_entropy

CHUNK = 8192  # rows of the head whose logits exist at one time


def head_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, group: Group, chunk: int = CHUNK
) -> Tensor:
    """Losses [B, S] in fp32 of hidden [B, S, D] and a head [V / tp, D]; 0 where the label is `ignore`.

    Every rank of the group has the same hidden states and gets the same losses; the gradient of the hidden
    states is its part of a sum over the ranks.
    """
    if len(weight) <= chunk:
        return cross_entropy(linear(hidden, weight).float(), labels, ignore, group)
    losses: Tensor = _HeadLosses.apply(hidden.flatten(0, 1), weight, labels.flatten(), ignore, group, chunk)
    return losses.view_as(labels)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, ignore: int, group: Group, chunk: int
    ) -> Tensor:
        ignored = labels == ignore
        own = labels - group_rank(group) * len(weight)  # the label's row of this rank's weight, if in range
        own = own.masked_fill(ignored | (own < 0) | (own >= len(weight)), -1)
        greatest = rows.new_full(labels.shape, -torch.inf, dtype=torch.float32)
        total, of_label = torch.zeros_like(greatest), torch.zeros_like(greatest)
        for begin, part in _chunks(weight, chunk):
            logits = F.linear(rows, part).float()
            column, here = _columns(own, begin, len(part))
            of_label += logits.gather(1, column[:, None])[:, 0].masked_fill(~here, 0.0)
            higher = torch.maximum(greatest, logits.amax(1))
            total *= (greatest - higher).exp_()
            total += logits.sub_(higher[:, None]).exp_().sum(1)
            greatest = higher
            del logits  # before the next chunk's are made
        if group is not None:
            highest = all_reduce(greatest.clone(), group, op=dist.ReduceOp.MAX)
            total *= (greatest - highest).exp_()
            greatest = highest
            total, of_label = all_reduce(torch.stack((total, of_label)), group)
        ctx.save_for_backward(rows, own, ignored, greatest, total)
        ctx.weight, ctx.chunk = weight, chunk
        return (total.log() - (of_label - greatest)).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, own, ignored, greatest, total = ctx.saved_tensors
        weight, (needs_rows, needs_weight, *_) = ctx.weight, ctx.needs_input_grad
        grad = grads[0].masked_fill(ignored, 0.0)
        share = (grad / total)[:, None]
        grad_rows = torch.zeros_like(rows, dtype=torch.float32) if needs_rows else None
        buffered = hasattr(weight, "main_grad")
        made = torch.empty_like(weight) if needs_weight and not buffered else None
        for begin, part in _chunks(weight, ctx.chunk):
            grad_logits = F.linear(rows, part).float().sub_(greatest[:, None]).exp_().mul_(share)
            column, here = _columns(own, begin, len(part))
            grad_logits.scatter_add_(1, column[:, None], -grad.masked_fill(~here, 0.0)[:, None])
            grad_logits = grad_logits.to(rows.dtype)
            if grad_rows is not None:
                _add_product(grad_rows, grad_logits, part)
            if made is not None:
                torch.mm(grad_logits.t(), rows, out=made[begin : begin + len(part)])
            elif needs_weight:
                add_weight_gradient(weight, slice(begin, begin + len(part)), grad_logits, rows)
            del grad_logits
        return None if grad_rows is None else grad_rows.to(rows.dtype), made, None, None, None, None


def _chunks(weight: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows [C, D], each part with the number of its first."""
    return ((begin, weight[begin : begin + chunk]) for begin in range(0, len(weight), chunk))


def _columns(own: Tensor, begin: int, size: int) -> tuple[Tensor, Tensor]:
    """Each token's label as a column of a chunk, 0 where it is elsewhere, and whether it is here."""
    here = (own >= begin) & (own < begin + size)
    return (own - begin).masked_fill(~here, 0), here


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype:
        target.addmm_(left, right)
    else:
        target.add_(left @ right)
