"""AdamW on fp32 masters, and the learning rate of a step.

A bf16 parameter has an fp32 master that the optimizer moves; an fp32 parameter is its own master.
Gradients come from the parameters' `main_grad` buffers (parallel/gradients.py).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe.config import OptimConfig
from parallel.shards import canonical

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate at a step (0-based) of a run of `steps`: linear warmup, then cosine or warmup-stable-decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        tail = max(1, round(config.decay_fraction * steps))
        factor = min(1.0, (steps - step) / tail)
    else:
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        factor = 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factor)


class Optimizer:
    """AdamW over a model whose parameters carry `main_grad`. Matrices decay, gains do not."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self._named = dict(model.named_parameters())
        self._masters = {name: _master(parameter) for name, parameter in self._named.items()}
        matrices = [master for master in self._masters.values() if master.dim() > 1]
        gains = [master for master in self._masters.values() if master.dim() <= 1]
        self._adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": gains, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for master in self._masters.values():  # made now, so that a checkpoint has something to fill
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in _MOMENTS},
            }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every master by its gradient at this learning rate, and the parameters with them."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        for name, master in self._masters.items():
            master.grad = self._named[name].main_grad  # type: ignore[attr-defined]
        self._adam.step()
        for name, master in self._masters.items():
            master.grad = None
            if master is not self._named[name]:
                self._named[name].copy_(master)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Masters and moments as `kind/canonical name`, views that can be read and written."""
        for name, master in self._masters.items():
            parameter = self._named[name]
            tensors = {moment: self._adam.state[master][moment] for moment in _MOMENTS}
            if master is not parameter:
                tensors["master"] = master.detach()
            for kind, tensor in tensors.items():
                for full_name, view in canonical(name, parameter, tensor):
                    yield f"{kind}/{full_name}", view

    def set_steps(self, steps: int) -> None:
        """How many steps the moments have seen; read from a checkpoint."""
        for state in self._adam.state.values():
            state["step"].fill_(steps)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
