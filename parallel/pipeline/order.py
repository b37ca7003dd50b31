"""An order in which the slots of all ranks can run, one after the other. No torch."""

from collections.abc import Iterator

from parallel.pipeline.action import Action, Schedule


def possible_order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    """(rank, slot) after all that the slot needs; ends early where every rank waits for another."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    waiting: dict[Action, int] = {}  # the rank that waits for an action's result
    ready = list(range(schedule.num_ranks))[::-1]
    while ready:
        rank = ready.pop()
        slots = schedule.slots[rank]
        while position[rank] < len(slots):
            slot = slots[position[rank]]
            missing = next((source for source in schedule.sources(slot) if source not in done), None)
            if missing is not None:
                waiting[missing] = rank
                break
            yield rank, position[rank]
            position[rank] += 1
            done.update(slot)
            ready += [waiting.pop(action) for action in slot if action in waiting]
