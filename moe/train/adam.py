"""Whose fused AdamW kernel moves the masters: torch's, NVIDIA apex's or Transformer Engine's.

All three are torch optimizers of the same arithmetic that keep `exp_avg` and `exp_avg_sq`; torch counts
steps in the state of a tensor, the other two in the parameter group. Of torch's only the kernel is taken:
an optimizer of its own imports the whole of torch's compiler, which costs every rank 1.5 s and 70 MB.
"""

import importlib
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.errors import UserError

# What is imported in turn (the last has `FusedAdam`), and what to install for it.
_OTHERS = {
    "apex": (("amp_C", "apex.optimizers"), "NVIDIA apex with its CUDA extensions"),
    "te": (("transformer_engine.pytorch.optimizers",), "transformer-engine[pytorch]"),
}


class Adam(Protocol):
    """What is used of a torch optimizer with one group of parameters."""

    param_groups: list[dict[str, Any]]
    state: MutableMapping[Tensor, dict[str, Tensor]]

    def step(self) -> None:
        """Move every parameter by its gradient; its state holds `exp_avg`, `exp_avg_sq` and `step`."""


class TorchAdam:
    """`torch.optim.AdamW(fused=True)`, without what it imports."""

    def __init__(self, params: Sequence[Tensor], **settings: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": params, **settings}]
        self.state: MutableMapping[Tensor, dict[str, Tensor]] = {parameter: {} for parameter in params}

    def step(self) -> None:
        """As `Adam` says."""
        (group,) = self.param_groups
        states = [self.state[parameter] for parameter in group["params"]]
        steps = [state["step"] for state in states]
        with torch.no_grad():
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                group["params"],
                [parameter.grad for parameter in group["params"]],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],  # no maximum of them is kept
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                amsgrad=False,
                maximize=False,
            )


def fused_adam(fused: str, device: torch.device) -> Callable[..., Adam]:
    """The maker of an AdamW (params, lr, betas, eps, weight_decay). UserError where it cannot run here."""
    if fused == "torch":
        return TorchAdam
    if device.type != "cuda":
        raise UserError(
            f"`optim.fused` must be torch where there is no GPU, but is {fused}: set `optim.fused=torch`"
        )
    modules, package = _OTHERS[fused]
    try:
        last = [importlib.import_module(module) for module in modules][-1]
    except (ImportError, OSError) as error:  # OSError: a shared library of theirs is missing
        raise UserError(
            f"`optim.fused` is {fused}, which cannot be imported ({error}): install {package} "
            "or set `optim.fused=torch`"
        ) from error
    return partial(last.FusedAdam, adam_w_mode=True)
