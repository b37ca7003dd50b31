"""Learning-rate schedules at their corners, and AdamW against torch's own on ordinary gradients."""

import pytest
import torch
from torch import nn

from moe.config import OptimConfig
from moe.train.optim import Optimizer, learning_rate
from parallel.gradients import GradientBuffers, parameter_sets
from parallel.groups import single
from parallel.linear import Linear


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("wsd", 0, 0.1),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1, schedule=schedule, decay_fraction=0.2)  # type: ignore[arg-type]
    assert learning_rate(config, step, 100) == pytest.approx(expected)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear(3, 4)
        self.gain = nn.Parameter(torch.ones(4))
        nn.init.normal_(self.inner.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.inner(rows) * self.gain).square().sum()


def test_equals_torch_adamw() -> None:
    """Matrices decay, gains do not, and `main_grad` is what moves them."""
    ours, theirs = Small(), Small()
    GradientBuffers(parameter_sets(ours.parameters(), single()))
    optimizer = Optimizer(ours, OptimConfig(weight_decay=0.5))
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.inner.weight], "weight_decay": 0.5},
            {"params": [theirs.gain], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for parameter in ours.parameters():
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        ours(rows).backward()
        optimizer.step(0.1)
        reference.zero_grad()
        theirs(rows).backward()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
