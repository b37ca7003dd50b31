"""What a check compares with: the same values in fp64 on the CPU, and how far off a result is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Found:
    """The greatest error of a check, relative to the size of what is exact, and what it was found in."""

    error: float
    note: str = ""


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, in fp64; infinite where a result is not finite."""
    found = found.detach().double().cpu()
    assert found.shape == exact.shape, f"{tuple(found.shape)} is compared with {tuple(exact.shape)}"
    if not found.isfinite().all():
        return float("inf")
    size = exact.norm().item()
    return (found - exact).norm().item() / (size or 1.0)


def worst(pairs: Mapping[str, tuple[Tensor, Tensor]], note: str = "") -> Found:
    """The greatest relative error of results and exact ones, and whose it is."""
    errors = {name: relative(found, exact.detach()) for name, (found, exact) in pairs.items()}
    name = max(errors, key=lambda each: errors[each])
    return Found(errors[name], "; ".join(part for part in (f"worst: {name}", note) if part))


def share_differing(found_TK: Tensor, exact_TK: Tensor) -> float:
    """Of the rows, those that are not equal."""
    return (found_TK.cpu() != exact_TK).any(-1).double().mean().item()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 1.0) -> Tensor:
    """Normal values on the CPU that the dtype can hold."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def leaf(tensor: Tensor) -> Tensor:
    """The same values in fp64 on the CPU, to be differentiated by."""
    return tensor.detach().double().cpu().requires_grad_()


def with_buffers(module: nn.Module) -> None:
    """Give every weight the fp32 buffer that training gives it, which holds 0."""
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, wherever it was put, in fp64 on the CPU."""
    found = {}
    for name, parameter in module.named_parameters():
        total = torch.zeros_like(parameter, dtype=torch.float64, device="cpu")
        for part in (getattr(parameter, "main_grad", None), parameter.grad):
            if part is not None:
                total += part.double().cpu()
        found[name] = total
    return found


@contextmanager
def wide() -> Iterator[None]:
    """Models of fp64 stay so inside: where they would narrow a value to fp32, it is widened instead."""
    with patch.object(Tensor, "float", Tensor.double):
        yield
