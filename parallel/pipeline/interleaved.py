"""Interleaved 1F1B (Megatron-LM, arXiv 2104.04473, section 2.2): several short stages on each rank. No torch.

Of P ranks with v stages each, rank r holds r, r + P, r + 2P, ... Microbatches pass in rounds of P: a
rank runs a round on its first stage, then on its second, and so on. Filling and draining take 1/v of
1F1B's time, for v times the traffic between ranks and a few more microbatches in flight.
"""

from parallel.pipeline.action import Action, Kind, Schedule


def interleaved(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """Interleaved 1F1B; the microbatches must be a multiple of the ranks."""
    assert num_microbatches % num_ranks == 0, f"{num_microbatches} microbatches in rounds of {num_ranks}"
    total, slots = num_microbatches * stages_per_rank, []
    held = [tuple(rank + num_ranks * index for index in range(stages_per_rank)) for rank in range(num_ranks)]
    for rank, mine in enumerate(held):
        forward = [_action("F", count, mine, num_ranks) for count in range(total)]
        backward = [_action("B", count, mine[::-1], num_ranks) for count in range(total)]
        ahead = min(total, 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks)
        order = forward[:ahead]
        for count in range(total - ahead):
            order += [forward[ahead + count], backward[count]]
        order += backward[total - ahead :]
        slots.append(tuple((action,) for action in order))
    return Schedule("interleaved", num_microbatches, tuple(held), tuple(slots))


def _action(kind: Kind, count: int, stages: tuple[int, ...], num_ranks: int) -> Action:
    """The count-th action of its kind: a round of microbatches on one stage, then on the next."""
    turn, place = divmod(count, num_ranks * len(stages))
    index, within = divmod(place, num_ranks)
    return Action(kind, turn * num_ranks + within, stages[index])
