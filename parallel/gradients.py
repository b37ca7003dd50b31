"""Gradient buffers: one flat fp32 tensor per kind of parameter, reduced and normed exactly once.

Dense and expert parameters are replicated over different groups. Each set says over which ranks its
tensors are copies (gradients are summed there) and over which they are parts (norms are summed there).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import Group, all_reduce
from parallel.groups import Groups
from parallel.shards import is_expert


@dataclass(frozen=True)
class ParameterSet:
    """Parameters that share their `replicas` (ranks with copies) and `parts` (ranks with other parts)."""

    parameters: tuple[nn.Parameter, ...]
    replicas: Group
    parts: Group


def parameter_sets(parameters: Iterable[nn.Parameter], groups: Groups) -> list[ParameterSet]:
    """Dense parameters, replicated over `dp`, and experts, replicated over `expert_dp` and cut over `ep`."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        kinds[is_expert(parameter)].append(parameter)
    sets = [
        ParameterSet(tuple(kinds[False]), groups.dp, None),
        ParameterSet(tuple(kinds[True]), groups.expert_dp, groups.ep),
    ]
    return [chosen for chosen in sets if chosen.parameters]


class GradientBuffers:
    """Gives every parameter a view `main_grad` of a flat fp32 buffer, and keeps the buffers' arithmetic."""

    def __init__(self, sets: list[ParameterSet]) -> None:
        self._sets = sets
        self._flats = [_flat_buffer(chosen.parameters) for chosen in sets]

    def zero(self) -> None:
        """Forget the gradients."""
        for flat in self._flats:
            flat.zero_()

    def reduce(self) -> None:
        """Sum the gradients over the ranks that hold copies."""
        works = [
            dist.all_reduce(flat, group=chosen.replicas, async_op=True)
            for flat, chosen in zip(self._flats, self._sets, strict=True)
            if chosen.replicas is not None
        ]
        for work in works:
            work.wait()

    def norm(self) -> float:
        """The 2-norm of the whole model's gradient, every element counted once. Same on every rank."""
        total = 0.0
        for flat, chosen in zip(self._flats, self._sets, strict=True):
            square = torch.linalg.vector_norm(flat, dtype=torch.float64).square()
            total += all_reduce(square, chosen.parts).item()
        return total**0.5

    def scale(self, factor: float) -> None:
        """Multiply every gradient."""
        for flat in self._flats:
            flat.mul_(factor)


def _flat_buffer(parameters: tuple[nn.Parameter, ...]) -> Tensor:
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    begin = 0
    for parameter in parameters:
        parameter.main_grad = flat[begin : begin + parameter.numel()].view_as(parameter)  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(_move_to_buffer)
        begin += parameter.numel()
    return flat


def _move_to_buffer(parameter: Tensor) -> None:
    """Gradients that autograd makes itself (norm gains, embeddings) join those of the products."""
    if parameter.grad is not None:  # autograd calls this too when a product made the gradient itself
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None
