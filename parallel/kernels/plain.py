"""What every kernel of this folder computes, in torch: for the CPU, and to hold the kernels against.

Sums are in fp32, or in fp64 for fp64 inputs.
Legend: S source rows, N rows in expert order, K slots, D hidden size, F expert width, e experts, O outputs,
I inputs, T tokens, E experts of all ranks.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """In fp32; fp64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def permute(rows: Tensor, index_N: Tensor) -> Tensor:
    """rows [S, D] -> [N, D]."""
    return rows.index_select(0, index_N)


def unpermute(rows: Tensor, slots_SK: Tensor) -> Tensor:
    """rows [N, D] -> [S, D]: the sum of each source row's slots, -1 for none."""
    padded = F.pad(rows, (0, 0, 0, 1))  # a last row of zeros is where -1 points
    return wide(padded[slots_SK]).sum(1).to(rows.dtype)


def weighted_swiglu(gate_up: Tensor, weights_N: Tensor, end: Tensor) -> Tensor:
    """gate_up [N, 2F], gate then up -> [N, F]."""
    del end  # nothing is read of the rows beyond it
    gate, up = wide(gate_up).chunk(2, dim=1)
    return (weights_N[:, None] * F.silu(gate) * up).to(gate_up.dtype)


def weighted_swiglu_back(grad_act: Tensor, gate_up: Tensor, weights_N: Tensor, end: Tensor) -> Tensor:
    """The gradient of the weights [N]; grad_act becomes the activation, gate_up [N, 2F] its own gradient."""
    (gate, up), weights = wide(gate_up).chunk(2, dim=1), weights_N[:, None]
    sigmoid, upstream = gate.sigmoid(), wide(grad_act)
    silu = gate * sigmoid
    grad_weights = (
        (upstream * silu * up).sum(1).masked_fill(torch.arange(len(up), device=up.device) >= end, 0)
    )
    grad_gate = upstream * weights * up * (sigmoid + silu * (1 - sigmoid))
    act, grad_up = weights * silu * up, upstream * weights * silu
    grad_act.copy_(act)
    gate_up.copy_(torch.cat((grad_gate, grad_up), 1))
    return grad_weights.to(weights_N.dtype)


def add_weight_gradients(
    target: Tensor,
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    grad_index_N: Tensor | None = None,
    row_index_N: Tensor | None = None,
) -> None:
    """target[i] += grad^T rows, over the rows of expert i."""
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        grads = grad[begin:end] if grad_index_N is None else grad[grad_index_N[begin:end]]
        inputs = rows[begin:end] if row_index_N is None else rows[row_index_N[begin:end]]
        target[expert] += (wide(grads).t() @ wide(inputs)).to(target.dtype)


def top_k_in_groups(choice_TE: Tensor, top_k: int, num_groups: int, top_groups: int, best: int) -> Tensor:
    """The experts [T, K] with the greatest scores within the groups whose best ones have the greatest sum."""
    choice_TGe = wide(choice_TE).nan_to_num(nan=-1e30).unflatten(1, (num_groups, -1))
    group_TG = choice_TGe.topk(best, dim=-1).values.sum(-1)
    ranked_TG = group_TG.argsort(dim=-1, descending=True, stable=True)
    dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, ranked_TG[:, :top_groups], False)
    limited_TE = choice_TGe.masked_fill(dropped_TG[:, :, None], -torch.inf).flatten(1)
    return limited_TE.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
