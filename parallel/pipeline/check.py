"""The rules that every schedule obeys, proven before it runs. No torch.

Sends are asynchronous and receives block: a rank stands still only where a slot needs a result that
nobody has made yet.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import product

from parallel.errors import UserError
from parallel.pipeline.action import Action, Kind, Schedule
from parallel.pipeline.transfers import Channel, messages


def check(schedule: Schedule) -> None:
    """Raise UserError with a sentence that names rank, action and rule where a schedule breaks one."""
    for rule in (_ranges, _pairs, _each_once, _backward_after_forward, _queues, _progress):
        for broken in rule(schedule):
            raise UserError(f"in schedule `{schedule.name}` {broken}")


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most (microbatch, stage) whose activations are held at once; a pair holds both of its."""
    peaks = []
    for slots in schedule.slots:
        held = peak = 0
        for slot in slots:
            held += sum(action.kind == "F" for action in slot)
            peak = max(peak, held)
            held -= sum(action.kind == "B" for action in slot)
        peaks.append(peak)
    return tuple(peaks)


def _ranges(schedule: Schedule) -> Iterator[str]:
    for rank, held in enumerate(schedule.stages):
        for action in schedule.actions(rank):
            if action.stage not in held:
                yield f"rank {rank} runs {action}, but a rank runs the stages that it holds: {held}"
            if action.microbatch >= schedule.num_microbatches:
                yield f"rank {rank} runs {action}, but there are {schedule.num_microbatches} microbatches"


def _pairs(schedule: Schedule) -> Iterator[str]:
    for rank, slots in enumerate(schedule.slots):
        for slot in slots:
            if len(slot) != 1 and sorted(action.kind for action in slot) != ["B", "F"]:
                yield f"rank {rank} runs {slot[0]} in a slot of {len(slot)}, but a pair is an F and a B"


def _each_once(schedule: Schedule) -> Iterator[str]:
    ranks = range(schedule.num_ranks)
    runs = Counter(action for rank in ranks for action in schedule.actions(rank))
    kinds: tuple[Kind, ...] = ("F", "B") if any(action.kind == "B" for action in runs) else ("F",)
    microbatches, stages = range(schedule.num_microbatches), range(schedule.num_stages)
    for kind, microbatch, stage in product(kinds, microbatches, stages):
        action = Action(kind, microbatch, stage)
        if runs[action] != 1:
            holders = [str(rank) for rank in ranks if stage in schedule.stages[rank]]
            yield (
                f"rank {' or '.join(holders)} runs {action} {runs[action]} times, but every {kind} runs once "
                f"for each microbatch and stage"
            )


def _backward_after_forward(schedule: Schedule) -> Iterator[str]:
    for rank, slots in enumerate(schedule.slots):
        done: set[Action] = set()
        for slot in slots:
            for action in slot:
                if action.kind == "B" and Action("F", action.microbatch, action.stage) not in done:
                    yield f"rank {rank} runs {action}, but a B follows its own F in an earlier slot"
            done.update(slot)


def _queues(schedule: Schedule) -> Iterator[str]:
    made = {
        action: order
        for rank in range(schedule.num_ranks)
        for order, action in enumerate(schedule.actions(rank))
    }
    last: dict[Channel, Action] = {}
    for message in messages(schedule):
        result, channel = message.result, message.channel
        before = last.get(channel)
        if before is not None and made[before] > made[result]:
            yield (
                f"rank {channel.destination} uses the result of {result} after that of {before}, but results "
                f"are used in the order in which rank {channel.source} makes them"
            )
        last[channel] = result


def _progress(schedule: Schedule) -> Iterator[str]:
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, slots in enumerate(schedule.slots):
            while position[rank] < len(slots) and not _missing(schedule, rank, position[rank], done):
                done.update(slots[position[rank]])
                position[rank] += 1
                moved = True
    for rank, slots in enumerate(schedule.slots):
        if position[rank] < len(slots):
            action, source = _missing(schedule, rank, position[rank], done)[0]
            yield f"rank {rank} waits for ever to run {action}, but what it needs, {source}, must come first"


def _missing(schedule: Schedule, rank: int, index: int, done: set[Action]) -> list[tuple[Action, Action]]:
    """(action, result that it lacks) of a slot."""
    pairs = [(action, schedule.source(action)) for action in schedule.slots[rank][index]]
    return [(action, source) for action, source in pairs if source is not None and source not in done]
