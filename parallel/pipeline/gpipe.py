"""GPipe (arXiv 1811.06965): every microbatch forward, then every one backward. No torch.

The bubble is 1F1B's, but the activations of all microbatches are held at once. The forwards alone are
an evaluation.
"""

from parallel.pipeline.action import Schedule, one_stage_each


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, with stage r on rank r."""
    slots = [f"{kind}{i}" for kind in "FB" for i in range(num_microbatches)]
    return one_stage_each("gpipe", num_microbatches, [slots] * num_ranks)


def forward_only(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards and no backward, with stage r on rank r."""
    slots = [f"F{i}" for i in range(num_microbatches)]
    return one_stage_each("forward", num_microbatches, [slots] * num_ranks)
