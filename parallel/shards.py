"""How each parameter is cut and replicated: what checkpoint, conversion and optimizer need to know.

A parameter is whole on every rank, or a stack [e, ...] of this rank's experts. Its canonical names
know no layout: every expert stands by itself, as `layers.3.moe.experts.17.down.weight`.
"""

from collections.abc import Iterator

from torch import Tensor, nn


def mark_experts(parameter: nn.Parameter, first: int) -> None:
    """Record that axis 0 of a parameter runs over this rank's experts, beginning with expert `first`."""
    parameter.first_expert = first  # type: ignore[attr-defined]


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter is a stack of experts, different on every rank of the expert group."""
    return hasattr(parameter, "first_expert")


def canonical(name: str, parameter: Tensor, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, view) pairs of a tensor shaped like the parameter: its value, gradient or moment."""
    if not is_expert(parameter):
        yield name, tensor
        return
    head, stack, tail = name.rpartition("experts.")
    assert stack, f"{name} is stacked by expert, but its name has no `experts`"
    for index in range(tensor.shape[0]):
        yield f"{head}{stack}{parameter.first_expert + index}.{tail}", tensor[index]  # type: ignore[attr-defined]


def canonical_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a module under its canonical names, as views that can be written."""
    for name, parameter in module.named_parameters():
        yield from canonical(name, parameter, parameter.detach())
