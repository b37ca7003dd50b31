"""The floor of `bench layer`: a layer's matrix products and nothing else, written into tensors made before.

Forward, gradients of rows and gradients of weights; router (in fp32) and shared experts included. Per expert
with the rows that the case really gives it, or, to tell what grouping costs by itself, all rows at once
with one expert's weight.
Legend: N rows of experts, D hidden size, F expert width, O outputs, I inputs.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from launch.bench.case import Case

Product = tuple[Tensor, Tensor, Tensor]  # left, right, where to


class Floor:
    """Two lists of products, run one by one."""

    def __init__(self, case: Case, *, at_once: bool = False) -> None:
        self.name = "one product" if at_once else "floor"
        self._output = case.grad
        weights, rows = case.weights, case.hidden.detach()[0]
        ends = list(accumulate(case.counts, initial=0))
        spans = [(0, ends[-1])] if at_once else list(pairwise(ends))
        by_expert = rows[case.experts_TK.flatten().argsort() // case.shape.top_k]
        self._forward: list[Product] = []
        self._backward: list[Product] = []
        self._add(rows.float(), weights.router.float()[None], [(0, len(rows))])
        for taken, gate_up, down, where in (
            (by_expert, weights.gate_up, weights.down, spans),
            (rows, weights.shared_gate_up[None], weights.shared_down[None], [(0, len(rows))]),
        ):
            self._add(taken, gate_up, where)
            self._add(taken.new_empty(len(taken), down.shape[2]).normal_(), down, where)

    def _add(self, rows: Tensor, weights: Tensor, spans: list[tuple[int, int]]) -> None:
        """The three products of rows [N, I] with weights [e, O, I], a span of rows for each."""
        out = rows.new_empty(len(rows), weights.shape[1])
        grad, grad_rows = torch.randn_like(out), torch.empty_like(rows)
        grad_weights = torch.empty_like(weights[: len(spans)])
        for expert, (begin, end) in enumerate(spans):
            if begin < end:
                part, weight = slice(begin, end), weights[expert]
                self._forward.append((rows[part], weight.t(), out[part]))
                self._backward.append((grad[part], weight, grad_rows[part]))
                self._backward.append((grad[part].t(), rows[part], grad_weights[expert]))

    def forward(self, hidden: Tensor) -> Tensor:
        """The forward's products; what is returned means nothing."""
        for left, right, out in self._forward:
            torch.mm(left, right, out=out)
        return self._output

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """The backward's products."""
        for left, right, out in self._backward:
            torch.mm(left, right, out=out)

    def clear(self) -> None:
        """Nothing to clear: results are written over."""

    def flops(self) -> int:
        """Of all products, as they are: two for a multiply-add."""
        products = (*self._forward, *self._backward)
        return sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in products)
