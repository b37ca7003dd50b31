"""Which layers a pipeline stage holds: stages of equal work, as far as whole layers allow. No torch.

A pipeline runs at the speed of its slowest stage, and layers differ: the first are dense, and behind the
last come the head and the MTP modules, which may weigh several layers. So stages are uneven in layers,
may hold no layer of experts, and may hold no layer at all.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from moe.config import ModelConfig
from moe.model.costs import part_costs

Ways = dict[int, tuple[int, tuple[int, ...]]]  # by the part where stages end: sum of squares, begins


@dataclass(frozen=True)
class Part:
    """Layers of one stage; the first embeds tokens, the last has norm, head and MTP modules."""

    layers: range
    first: bool
    last: bool


def split(config: ModelConfig, num_stages: int, sequence_length: int) -> tuple[Part, ...]:
    """Layers in order, shared out by their work (`part_costs`) on sequences of this length.

    The greatest work of a stage is the least possible. Among the splits that reach it this is the most
    even one, of the least sum of squares; among equally even ones, that with the fewest layers on the
    first stage, then on the second, and so on: early stages keep the most microbatches in flight.
    """
    costs = part_costs(config, sequence_length)
    cuts = _most_even(costs, num_stages, _least_limit(costs, num_stages))
    bounds = (0, *(cut - 1 for cut in cuts), config.num_layers)  # the embedding is part 0
    return tuple(
        Part(range(begin, end), stage == 0, stage == num_stages - 1)
        for stage, (begin, end) in enumerate(pairwise(bounds))
    )


def whole(num_layers: int) -> Part:
    """All of a model on one stage."""
    return Part(range(num_layers), True, True)


def _least_limit(costs: Sequence[int], num_stages: int) -> int:
    """The least work that no stage has to exceed."""
    limits = range(max(costs), sum(costs) + 1)
    return limits[bisect_left(limits, True, key=lambda limit: _stages_needed(costs, limit) <= num_stages)]


def _stages_needed(costs: Sequence[int], limit: int) -> int:
    """How many stages it takes if each is filled up to a limit that no single part exceeds."""
    stages, work = 1, 0
    for cost in costs:
        if work + cost > limit:
            stages, work = stages + 1, 0
        work += cost
    return stages


def _most_even(costs: Sequence[int], num_stages: int, limit: int) -> tuple[int, ...]:
    """The parts that stages 1, 2, ... begin with where no stage exceeds the limit, the most even way.

    Stage by stage, of all ways to end a stage before the same part only the best one is kept.
    """
    before = list(accumulate(costs, initial=0))
    # The first part stays on the first stage and the last on the last, whatever is left for the others.
    ends = [range(1, len(costs))] * (num_stages - 1) + [range(len(costs), len(costs) + 1)]
    best: Ways = {0: (0, ())}
    for possible in ends:
        further: Ways = {}
        for begin, (squares, begins) in best.items():
            for end in possible:
                work = before[end] - before[begin]
                if 0 <= work <= limit:
                    way = squares + work**2, (*begins, begin)
                    further[end] = min(way, further.get(end, way))
        best = further
    return best[len(costs)][1][1:]
