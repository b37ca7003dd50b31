"""DualPipeV (DeepSeek, DualPipe repository): half of DualPipe's pipeline, folded at its middle. No torch.

Rank r of P holds stages r and 2P - 1 - r: a microbatch goes up the ranks and comes down again, so that
no stage is held twice, and first and last stage, with embedding and head, meet on rank 0. Its ranks take
the steps of the first half of a DualPipe of 2P ranks, in which every microbatch takes both directions.
The bubble is (P - 1)(F&B + B - 3W) of stages half as long, at 2P + 1 of them in flight.
"""

from parallel.pipeline.action import Schedule
from parallel.pipeline.dualpipe import Walk


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV over P ranks, of at least 2P microbatches."""
    assert num_microbatches >= 2 * num_ranks, f"{num_microbatches} is too few"
    each, spare = range(num_microbatches), num_microbatches - 2 * num_ranks
    stages = tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks))
    slots = tuple(
        tuple(Walk(near=(up, each), far=(down, each)).eight_steps(num_ranks - 1 - up, up + 1, spare))
        for up, down in stages
    )
    return Schedule("dualpipev", num_microbatches, stages, slots)
