"""Softmax attention, whole or over a part of the keys, and the merging of such parts into the whole.

A partial attention returns, beside its output, the log of its softmax's denominator (`lse`). Outputs
over disjoint keys then add up to attention over all of them, weighted by softmax(lse) over the parts.
Both results carry gradients: with P the probabilities of a part and S its scores,
dS = P * (dP - sum over keys of P dP + dlse), where that sum is dout . out (FlashAttention, 2205.14135).
Legend: B sequences, S positions (Q of the queries, K of the keys), H heads, D width of a query, V of a
value.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # queries whose scores exist at one time

Documents = tuple[Tensor, Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """[B, S, H, D], [B, S, H, D] and [B, S, H, V] -> [B, S, H, V].

    `mask` [B, 1, S, S] is true where a query may look; None is causal.
    """
    width = value.shape[-1]
    if width < query.shape[-1]:
        # The flash kernels want one head width; without them the S x S scores would be kept.
        value = F.pad(value, (0, query.shape[-1] - width))
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return mixed.transpose(1, 2)[..., :width]


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """[B, Q, H, D], [B, K, H, D] and [B, K, H, V] -> output [B, Q, H, V] and its lse [B, Q, H] in fp32.

    `causal` is for queries and keys of the same positions, in ascending order. `documents`, the numbers
    [B, Q] of the queries and [B, K] of the keys, keep attention inside a document. A query that may look
    nowhere has output 0 and lse -inf. Both results are differentiable, and no score outlives its block.
    """
    assert not causal or query.shape[1] == key.shape[1], "causal attention is over one set of positions"
    return _PartialAttention.apply(query, key, value, scale, causal, documents)


def merge(*outs_and_lses: Tensor) -> Tensor:
    """Attention over all keys from out, lse, out, lse, ... of partial attentions over disjoint ones.

    The first part is of every query: [B, Q, H, V] and [B, Q, H]; a shorter part is of the last queries.
    Where no part could look anywhere the result is 0.
    """
    outs, lses = outs_and_lses[::2], outs_and_lses[1::2]
    length = outs[0].shape[1]
    lse = torch.stack([F.pad(part, (0, 0, length - part.shape[1], 0), value=-torch.inf) for part in lses])
    blind = (lse == -torch.inf).all(0)
    shares = lse.masked_fill(blind, 0.0).softmax(0).unsqueeze(-1)  # all -inf would give NaN
    merged = shares[0] * outs[0]
    for share, out in zip(shares[1:], outs[1:], strict=True):
        first = length - out.shape[1]
        merged[:, first:] += share[:, first:] * out
    return merged.to(outs[0].dtype)


def document_mask(documents: Tensor) -> Tensor:
    """Causal attention inside each document: [B, S] document numbers -> [B, 1, S, S], true where allowed."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


class _PartialAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = value.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=wide)
        q, k, v = _by_head(query), _by_head(key), _by_head(value)
        for rows, seen, scores in _blocks(q, k, scale, causal, documents):
            total = scores.logsumexp(-1)
            out[:, rows] = (_probabilities(scores, total).to(v.dtype) @ v[:, :, seen]).transpose(1, 2)
            lse[:, rows] = total.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.causal, ctx.documents = scale, causal, documents
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        q, k, v, grad = _by_head(query), _by_head(key), _by_head(value), _by_head(grad_out)
        total = _by_head(lse)
        level = _by_head((grad_out.to(lse.dtype) * out).sum(-1) - grad_lse)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        for rows, seen, scores in _blocks(q, k, ctx.scale, ctx.causal, ctx.documents):
            chances = _probabilities(scores, total[:, :, rows])
            grad_v[:, :, seen] += chances.to(v.dtype).mT @ grad[:, :, rows]
            grad_scores = (grad[:, :, rows] @ v[:, :, seen].mT).to(lse.dtype)  # so far of P
            grad_scores.sub_(level[:, :, rows, None]).mul_(chances).mul_(ctx.scale)
            grad_scores = grad_scores.to(q.dtype)
            grad_q[:, :, rows] = grad_scores @ k[:, :, seen]
            grad_k[:, :, seen] += grad_scores.mT @ q[:, :, rows]
        grad_inputs = (part.transpose(1, 2).to(q.dtype) for part in (grad_q, grad_k, grad_v))
        return *grad_inputs, None, None, None


def _by_head(tensor: Tensor) -> Tensor:
    """[B, S, H, ...] -> [B, H, S, ...], laid out so that a block's product copies nothing."""
    return tensor.transpose(1, 2).contiguous()


def _blocks(
    query: Tensor, key: Tensor, scale: float, causal: bool, documents: Documents | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Block by block of queries: which queries, which keys at most they see, their scores [B, H, q, k].

    `query` [B, H, Q, D] and `key` [B, H, K, D]; -inf where a query may not look.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    for begin in range(0, query.shape[2], BLOCK):
        rows = slice(begin, min(begin + BLOCK, query.shape[2]))
        seen = slice(0, rows.stop if causal else key.shape[2])
        scores = (query[:, :, rows] @ key[:, :, seen].mT).to(wide).mul_(scale)
        if causal:
            square = scores[..., rows]  # all keys before it are in the past of the whole block
            square.masked_fill_(torch.ones_like(square[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        if documents is not None:
            of_queries, of_keys = documents
            foreign = of_queries[:, None, rows, None] != of_keys[:, None, None, seen]
            scores.masked_fill_(foreign, -torch.inf)
        yield rows, seen, scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 for a query that may look nowhere; made in place of the scores."""
    return scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)).exp_()
