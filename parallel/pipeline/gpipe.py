"""GPipe (arXiv 1811.06965): every microbatch forward, then every one backward. No torch.

The bubble is 1F1B's, but the activations of all microbatches are held at once. The forwards alone are
an evaluation.
"""

from collections.abc import Sequence

from parallel.pipeline.action import Action, Schedule, one_stage_each


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, with stage r on rank r."""
    slots = [f"{kind}{i}" for kind in "FB" for i in range(num_microbatches)]
    return one_stage_each("gpipe", num_microbatches, [slots] * num_ranks)


def forward_only(stages: Sequence[Sequence[int]], num_microbatches: int) -> Schedule:
    """All forwards and no backward, over stages by rank; a rank runs all of one stage, then of the next."""
    slots = tuple(
        tuple((Action("F", microbatch, stage),) for stage in held for microbatch in range(num_microbatches))
        for held in stages
    )
    return Schedule("forward", num_microbatches, tuple(tuple(held) for held in stages), slots)
