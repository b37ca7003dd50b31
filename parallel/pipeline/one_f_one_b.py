"""1F1B (PipeDream-Flush, arXiv 2006.09503): some forwards ahead, then one forward, one backward. No torch.

Rank r of P runs P - 1 - r forwards ahead and never holds more than P - r microbatches. With `overlap`
the forward and the backward of the steady state are a pair, stepped in turn to hide each other's
all-to-all. A pair needs a result from either side before it begins: for both neighbours to compute
meanwhile, rank r runs 2 (P - 1 - r) + 1 forwards ahead, and holds up to 2 (P - r) microbatches. On one
rank that is F0, F1&B0, F2&B1, ...: microbatches overlap without any pipeline.
"""

from parallel.pipeline.action import Schedule, one_stage_each


def one_f_one_b(num_ranks: int, num_microbatches: int, *, overlap: bool = False) -> Schedule:
    """1F1B with stage r on rank r. There may be fewer microbatches than ranks."""
    ranks = []
    for rank in range(num_ranks):
        behind = num_ranks - 1 - rank  # ranks that a microbatch has yet to pass
        ahead = min(num_microbatches, 2 * behind + 1 if overlap else behind)
        slots = [f"F{i}" for i in range(ahead)]
        for i in range(num_microbatches - ahead):
            slots += [f"F{ahead + i}&B{i}"] if overlap else [f"F{ahead + i}", f"B{i}"]
        slots += [f"B{i}" for i in range(num_microbatches - ahead, num_microbatches)]
        ranks.append(slots)
    return one_stage_each("1f1b-overlap" if overlap else "1f1b", num_microbatches, ranks)
