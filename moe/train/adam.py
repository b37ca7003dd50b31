"""Whose fused AdamW kernel moves the masters: torch's, NVIDIA apex's or Transformer Engine's.

All three are torch optimizers of the same arithmetic that keep `exp_avg` and `exp_avg_sq`; torch counts
steps in the state of a tensor, the other two in the parameter group.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch

from parallel.errors import UserError

# What is imported in turn (the last has `FusedAdam`), and what to install for it.
_OTHERS = {
    "apex": (("amp_C", "apex.optimizers"), "NVIDIA apex with its CUDA extensions"),
    "te": (("transformer_engine.pytorch.optimizers",), "transformer-engine[pytorch]"),
}


def fused_adam(fused: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The maker of an AdamW (params, lr, betas, eps, weight_decay). UserError where it cannot run here."""
    if fused == "torch":
        return partial(torch.optim.AdamW, fused=True)
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
