"""ZB-H1 (Zero Bubble, arXiv 2401.10241, section 3): 1F1B whose weight gradients fill the bubble. No torch.

Rank r holds back r weight gradients: gradients for the rank before leave r times W earlier, and what was
held back is made up where 1F1B would wait at the end. Activations stay until their W, so that every
rank holds P microbatches, as 1F1B's first one does. The bubble is (P - 1)(F + B - 2W), where B is the
whole backward.
"""

from collections import deque

from parallel.pipeline.action import Schedule, one_stage_each


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1 with stage r on rank r. There may be fewer microbatches than ranks."""
    ranks = []
    for rank in range(num_ranks):
        ahead, apart = min(num_microbatches, num_ranks - 1 - rank), deque[str]()
        slots = [f"F{i}" for i in range(ahead)]
        for i in range(num_microbatches):
            if ahead + i < num_microbatches:
                slots.append(f"F{ahead + i}")
            slots.append(f"B{i}")
            apart.append(f"W{i}")
            if len(apart) > rank:
                slots.append(apart.popleft())
        ranks.append([*slots, *apart])
    return one_stage_each("zb-h1", num_microbatches, ranks)
