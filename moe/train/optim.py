"""AdamW on the shards a rank owns, and the learning rate of a step.

The optimizer sees segments (parallel/zero.py), never a model: it moves fp32 masters by fp32 gradients.
Moments may be kept in bf16, as DeepSeek-V3 does (2412.19437, section 3.3.3): they are widened for a step,
which is computed in fp32, and rounded when stored.
"""

import math
from collections.abc import Iterable, Iterator

import torch

from moe.config import OptimConfig
from moe.train.adam import fused_adam
from parallel.runs import runs
from parallel.shards import Piece, pieces
from parallel.zero import Segment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK = 2**26  # elements moved by one call, which bounds the memory of widened moments


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate at a step (0-based) of a run of `steps`: linear warmup, then what the schedule says.

    All of it between `config.begin_step` and the end. `multistep` is DeepSeek-V2-Lite's: times 0.316 after
    80% of the steps and again after 90% (2405.04434, appendix B).
    """
    step, steps = step - config.begin_step, steps - config.begin_step
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "multistep":
        return config.lr * 0.316 ** ((step >= 0.8 * steps) + (step >= 0.9 * steps))
    if config.schedule == "wsd":
        left = min(1.0, (steps - step) / max(1, round(config.decay_fraction * steps)))
        factor = left if config.decay == "linear" else _cosine(1 - left)
    else:
        factor = _cosine(min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factor)


def _cosine(done: float) -> float:
    """Half a wave from 1 to 0."""
    return 0.5 + 0.5 * math.cos(math.pi * done)


class Optimizer:
    """AdamW over segments. Those of matrices decay, those of gains do not."""

    def __init__(self, segments: Iterable[Segment], config: OptimConfig) -> None:
        kinds: tuple[list[Segment], list[Segment]] = ([], [])
        for segment in segments:
            kinds[segment.parameter.dim() > 1].append(segment)
        self._chunks = [
            _Chunk(chunk, config, decay)
            for kind, decay in zip(kinds, (0.0, config.weight_decay), strict=True)
            for chunk in runs(kind, lambda segment: segment.master.numel(), _CHUNK)
        ]

    def step(self, rate: float) -> None:
        """Move every master by its gradient at this learning rate."""
        for chunk in self._chunks:
            chunk.step(rate)

    def state(self) -> Iterator[Piece]:
        """Moments, and masters that are not weights, as `kind/canonical name`: views that can be written."""
        for chunk in self._chunks:
            for segment, kept in zip(chunk.segments, chunk.moments, strict=True):
                tensors = kept if segment.master is segment.weight else {**kept, "master": segment.master}
                for kind, flat in tensors.items():
                    yield from pieces(f"{kind}/{segment.name}", segment.parameter, flat, segment.begin)

    def set_steps(self, steps: int) -> None:
        """How many steps the moments have seen; read from a checkpoint."""
        for chunk in self._chunks:
            chunk.set_steps(steps)


class _Chunk:
    """Segments that one call moves, and their moments as they are kept."""

    def __init__(self, segments: list[Segment], config: OptimConfig, decay: float) -> None:
        self.segments = segments
        self._masters = [segment.master for segment in segments]
        self.moments = [
            {moment: torch.zeros_like(master, dtype=DTYPES[config.moments]) for moment in _MOMENTS}
            for master in self._masters
        ]
        self._adam = fused_adam(config.fused, self._masters[0].device)(
            self._masters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=decay,
        )
        for segment in segments:
            segment.master.grad = segment.grad  # a view of the gradient buffer, for good
        self.set_steps(0)

    def step(self, rate: float) -> None:
        self._adam.param_groups[0]["lr"] = rate
        for master, kept in zip(self._masters, self.moments, strict=True):
            self._adam.state[master].update({name: moment.float() for name, moment in kept.items()})
        self._adam.step()
        for master, kept in zip(self._masters, self.moments, strict=True):
            for name, moment in kept.items():
                moment.copy_(self._adam.state[master].pop(name))  # fp32 was moved in place: nothing to do

    def set_steps(self, steps: int) -> None:
        self._adam.param_groups[0]["step"] = steps  # where apex and Transformer Engine count
        for master in self._masters:  # where torch counts
            self._adam.state[master]["step"] = torch.tensor(float(steps), device=master.device)
