"""Checks of Triton's kernels and of the experts path made of them; on the CPU their plain versions run.

Legend: S source rows, K slots, N rows in expert order, D hidden size, F expert width, e experts, T tokens.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.gpu.ceilings import float32_products
from launch.bench.gpu.exact import Found, gradients, leaf, normal, share_differing, with_buffers, worst
from launch.bench.gpu.shapes import choices
from moe.model.dispatch import Plan, make_plan
from parallel.activation import backward_by_kernel, forward_by_kernel
from parallel.grouped import Order
from parallel.grouped_cuda import gated_experts
from parallel.kernels import plain
from parallel.kernels.rows import permute, unpermute
from parallel.kernels.swiglu import weighted_swiglu, weighted_swiglu_back
from parallel.kernels.top_k import top_k_in_groups
from parallel.kernels.weight_gradient import add_weight_gradients

NUM_EXPERTS = 8
WITH_ROWS = torch.tensor([1, 2, 4, 6, 7, NUM_EXPERTS])  # the others get none; the last of these is no expert
WIDTH = 72  # times the size: wider than a program's block, of which a part stands over


def _plan(size: int) -> Plan:
    """Skewed choices [S, K] of experts, of which some have no row, and of none."""
    return make_plan(WITH_ROWS[choices("zipf", 24 * size, 3, len(WITH_ROWS))], NUM_EXPERTS)


def moved(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """Rows brought into expert order, and a source row's slots added up."""
    plan = _plan(size)
    index_N, slots = plan.token_N, plan.slot_TK
    source, ordered = (normal(count, WIDTH * size, dtype=dtype) for count in (24 * size, len(index_N)))
    exact = ordered.double()[slots].masked_fill((slots < 0)[..., None], 0).sum(1)
    permuted = permute(source.to(device), index_N.to(device))
    summed = unpermute(ordered.to(device), slots.to(device))
    return worst({"permuted": (permuted, source[index_N].double()), "summed": (summed, exact)})


def swiglu(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """The weighed activation and its backward, which makes it again; the last rows do not count."""
    end, count = 20 * size, 24 * size
    gate_up, grad, weights_N = _activation_inputs(count, size, dtype)
    gate_up[end:] = grad[end:] = torch.nan
    exact = _exact_activation(gate_up[:end], grad[:end], weights_N[:end])
    held, again, weights = (each.to(device, copy=True) for each in (gate_up, grad, weights_N))
    counted = torch.tensor([end], dtype=torch.int32, device=device)
    found = weighted_swiglu(held, weights, counted)
    grad_weights = weighted_swiglu_back(again, held, weights, counted)  # in place
    return worst(
        {
            "activation": (found[:end], exact[0]),
            "activation made again": (again[:end], exact[0]),
            "product's gradient": (held[:end], exact[1]),
            "weights' gradient": (grad_weights, F.pad(exact[2], (0, count - end))),
        }
    )


def activation(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """The same as layers call it: all rows count, with weights and without; inputs stay as they are."""
    gate_up, grad, weights_N = _activation_inputs(24 * size, size, dtype)
    held, upstream = gate_up.to(device), grad.to(device)
    pairs = {}
    for name, given in (("plain", None), ("weighed", weights_N)):
        weights = None if given is None else given.to(device)
        exact = _exact_activation(gate_up, grad, torch.ones_like(weights_N) if given is None else given)
        pairs[f"{name} activation"] = (forward_by_kernel(held, weights), exact[0])
        grad_product, grad_weights = backward_by_kernel(held, upstream, weights)
        pairs[f"{name} product's gradient"] = (grad_product, exact[1])
        if grad_weights is not None:
            pairs["weights' gradient"] = (grad_weights, exact[2])
    return worst(pairs)


def _activation_inputs(count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A product [N, 2F], the gradient [N, F] of its activation, and weights [N]."""
    return (
        normal(count, 2 * WIDTH * size, dtype=dtype),
        normal(count, WIDTH * size, dtype=dtype, seed=1),
        normal(count, seed=2).abs(),
    )


def _exact_activation(gate_up: Tensor, grad: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, the gradient of the product and that of the weights."""
    product, weights = leaf(gate_up), leaf(weights_N)
    gate, up = product.chunk(2, 1)
    made = weights[:, None] * F.silu(gate) * up
    grad_product, grad_weights = torch.autograd.grad(made, (product, weights), grad.double())
    return made.detach(), grad_product, grad_weights


GATES = ((6, 1, 1, 1, 64), (6, 8, 3, 1, 160), (8, 8, 4, 2, 256))  # of V2-Lite, V2 and V3


def top_k(device: torch.device, size: int) -> Found:
    """Tokens whose experts are not the plain version's, in its order; many scores tie, some are NaN."""
    differing = []
    for chosen, groups, kept, best, experts in GATES:
        choice_TE = normal(48 * size, experts)
        choice_TE[::2] = choice_TE[::2].mul(2).round() / 2 - 3
        choice_TE[5], choice_TE[7, ::3] = -3.0, torch.nan
        found_TK = top_k_in_groups(choice_TE.to(device), chosen, groups, kept, best)
        exact_TK = plain.top_k_in_groups(choice_TE, chosen, groups, kept, best)
        differing.append(share_differing(found_TK, exact_TK))
    return Found(max(differing))


def weight_gradients(device: torch.device, size: int, buffer: torch.dtype) -> Found:
    """grad^T rows of each expert onto a buffer that holds 1: in expert order, or one of the two by index."""
    plan = _plan(size)
    count, sources = len(plan.token_N), 24 * size
    offsets = torch.tensor(list(accumulate(plan.sent, initial=0)), dtype=torch.int32)
    pairs = {}
    for gathered in ("neither", "rows", "gradients"):
        for dtype in (torch.bfloat16, torch.float32) if buffer == torch.float32 else (torch.bfloat16,):
            grad_index = plan.token_N if gathered == "gradients" else None
            row_index = plan.token_N if gathered == "rows" else None
            grad = normal(sources if gathered == "gradients" else count, 40 * size, dtype=dtype)
            inputs = normal(sources if gathered == "rows" else count, 24 * size, dtype=dtype, seed=1)
            target = torch.ones(NUM_EXPERTS, 40 * size, 24 * size, dtype=buffer, device=device)
            indices = [None if each is None else each.to(device) for each in (grad_index, row_index)]
            add_weight_gradients(target, grad.to(device), inputs.to(device), offsets.to(device), *indices)
            exact = torch.ones(target.shape, dtype=torch.float64)
            facts = (grad.double(), inputs.double(), offsets, grad_index, row_index)
            plain.add_weight_gradients(exact, *facts)
            pairs[f"{gathered} gathered, of {dtype}"] = (target, exact)
    return worst(pairs)


def experts(device: torch.device, size: int, dtype: torch.dtype, *, buffered: bool) -> Found:
    """The experts path: one stack with buffers and counts on the device, or two stacks without."""
    plan, split = _plan(size), NUM_EXPERTS if buffered else NUM_EXPERTS // 2
    source = normal(24 * size, 32 * size, dtype=dtype)
    weights_N = normal(len(plan.token_N), seed=1).abs()
    gate_up = normal(NUM_EXPERTS, 48 * size, 32 * size, dtype=dtype, seed=2, std=(32 * size) ** -0.5)
    down = normal(NUM_EXPERTS, 32 * size, 24 * size, dtype=dtype, seed=3, std=(24 * size) ** -0.5)
    grad = normal(*source.shape, dtype=dtype, seed=4)
    leaves = [leaf(each) for each in (source, weights_N, gate_up, down)]
    exact = _by_expert(leaves[0], leaves[1], plan, leaves[2], leaves[3])
    exact_grads = torch.autograd.grad(exact, leaves, grad.double())
    held, weights = source.to(device).requires_grad_(), weights_N.to(device).requires_grad_()
    stacks = [nn.ParameterList(stack.to(device).split(split)) for stack in (gate_up, down)]
    for each in stacks if buffered else ():
        with_buffers(each)
    counts = plan.rows_E.to(device) if buffered else plan.sent
    order = Order(plan.token_N.to(device), plan.slot_TK.to(device))
    with float32_products("highest"):
        out = gated_experts(held, weights, order, counts, tuple(stacks[0]), tuple(stacks[1]))
        out.backward(grad.to(device))
    assert held.grad is not None and weights.grad is not None
    found = [held.grad, weights.grad, *(torch.cat(list(gradients(each).values())) for each in stacks)]
    names = ("source", "weights", "gate and up", "down")
    made = zip(names, found, exact_grads, strict=True)
    pairs = {f"gradient of {name}": (one, true) for name, one, true in made}
    return worst({"output": (out, exact)} | pairs)


def _by_expert(source: Tensor, weights_N: Tensor, plan: Plan, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same by its definition, one expert after the other."""
    out = torch.zeros_like(source)
    parts = zip(plan.token_N.split(plan.sent), weights_N.split(plan.sent), gate_up, down, strict=True)
    for index, weights, first, second in parts:
        gate, up = (source[index] @ first.T).chunk(2, 1)
        out = out.index_add(0, index, (weights[:, None] * F.silu(gate) * up) @ second.T)
    return out
