"""SwiGLU of a product, and weighed: w * silu(gate) * up. Gate and up lie side by side, gate first.

Of it only the product is kept; the activation is made again in the backward. Whatever the dtype it is
computed in fp32 and rounded once: on CUDA by a kernel of Triton, on the CPU in tiles that stay in a core's
cache, or by one loop that torch's compiler makes.
Legend: N rows, F width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2**18  # numbers of a tile: a megabyte in fp32


@dataclass(frozen=True)
class Activation:
    """How the CPU computes it, without gradients: in tiles, or as one loop that torch's compiler makes."""

    compiled: bool = False  # needs a compiler of C++, and some seconds at first

    def forward(self, gate_up: Tensor, weights_N: Tensor | None, out: Tensor) -> None:
        """Write the activation [N, F] of a product [N, 2F] into `out`."""
        self._run(_forward, gate_up, weights_N, out)

    def backward(
        self,
        gate_up: Tensor,
        grad: Tensor,
        grad_gate_up: Tensor,
        weights_N: Tensor | None,
        grad_weights_N: Tensor | None,
        activation: Tensor | None,
    ) -> None:
        """From the gradient [N, F] of the activation to those of the product [N, 2F] and the weights [N].

        They are written where they belong, and so is the activation, if there is a place for it.
        """
        self._run(_backward, gate_up, grad, grad_gate_up, weights_N, grad_weights_N, activation)

    def _run(self, function: Callable[..., None], gate_up: Tensor, *others: Tensor | None) -> None:
        if self.compiled and len(gate_up) > 1:  # a single row would be compiled as a case of its own
            _compiler(function)(gate_up, *others)
            return
        step = max(1, 2 * _TILE // gate_up.shape[1])
        for begin in range(0, len(gate_up), step):
            rows = slice(begin, begin + step)
            function(gate_up[rows], *(None if each is None else each[rows] for each in others))


TILED = Activation()


def swiglu(gate_up: Tensor, weights_N: Tensor | None = None, by: Activation = TILED) -> Tensor:
    """[..., 2F] -> silu(gate) * up [..., F]; of rows [N, 2F] each times its weight, if there are weights."""
    made: Tensor = _SwiGLU.apply(gate_up, weights_N, by)
    return made


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights_N: Tensor | None, by: Activation) -> Tensor:
        ctx.save_for_backward(gate_up, weights_N)
        ctx.by = by
        product = gate_up.flatten(0, -2)
        if gate_up.is_cuda:
            return forward_by_kernel(product, weights_N).unflatten(0, gate_up.shape[:-1])
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        by.forward(product, weights_N, out.flatten(0, -2))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up, weights_N = ctx.saved_tensors
        product, grad = gate_up.flatten(0, -2), grads[0].flatten(0, -2)
        if gate_up.is_cuda:
            grad_product, grad_weights = backward_by_kernel(product, grad, weights_N)
        else:
            grad_product = torch.empty_like(product)
            grad_weights = None if weights_N is None else torch.empty_like(weights_N)
            ctx.by.backward(product, grad, grad_product, weights_N, grad_weights, None)
        return grad_product.view_as(gate_up), grad_weights, None


def forward_by_kernel(product: Tensor, weights_N: Tensor | None) -> Tensor:
    """The activation [N, F] of a product [N, 2F]."""
    from parallel.kernels.swiglu import weighted_swiglu  # needs Triton

    return weighted_swiglu(product, *_weights_and_end(product, weights_N))


def backward_by_kernel(
    product: Tensor, grad: Tensor, weights_N: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a product [N, 2F] and of the weights [N], if there are any."""
    from parallel.kernels.swiglu import weighted_swiglu_back

    grad_product, activation = product.clone(), grad.clone()  # the kernel writes over both
    weights, end = _weights_and_end(product, weights_N)
    grad_weights = weighted_swiglu_back(activation, grad_product, weights, end)
    return grad_product, None if weights_N is None else grad_weights


def _weights_and_end(product: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor]:
    count = len(product)
    weights = product.new_ones(count, dtype=torch.float32) if weights_N is None else weights_N
    return weights, torch.full((1,), count, dtype=torch.int32, device=product.device)


def _widened(product: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, copied, in fp32 or wider."""
    copied = product.to(torch.promote_types(product.dtype, torch.float32), copy=True)
    gate, up = copied.chunk(2, 1)
    return gate, up


@functools.cache
def _compiler(function: Any) -> Any:
    """Compiled for some kinds of inputs; where there are too many, torch runs it as it is."""
    return torch.compile(function, dynamic=True)


def _forward(gate_up: Tensor, weights_N: Tensor | None, out: Tensor) -> None:
    gate, up = _widened(gate_up)
    if weights_N is not None:
        up.mul_(weights_N[:, None])
    out.copy_(F.silu(gate, inplace=True).mul_(up))


def _backward(
    gate_up: Tensor,
    grad: Tensor,
    grad_gate_up: Tensor,
    weights_N: Tensor | None,
    grad_weights_N: Tensor | None,
    activation: Tensor | None,
) -> None:
    (gate, up), width = _widened(gate_up), grad.shape[1]
    incoming, silu = grad.to(gate.dtype, copy=True), F.silu(gate)
    of_up = incoming * silu
    if weights_N is not None and grad_weights_N is not None:
        grad_weights_N.copy_((of_up * up).sum(1))
        of_up.mul_(weights_N[:, None])
        up.mul_(weights_N[:, None])
    grad_gate_up[:, width:] = of_up
    grad_gate_up[:, :width] = torch.ops.aten.silu_backward(incoming.mul_(up), gate)
    if activation is not None:
        activation.copy_(silu.mul_(up))
