"""The rules that every schedule obeys, proven before it runs. No torch.

Sends are asynchronous and receives block: a rank stands still only where a slot needs a result that
nobody has made yet.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from parallel.errors import UserError
from parallel.pipeline.action import KINDS, Action, Schedule
from parallel.pipeline.order import possible_order
from parallel.pipeline.transfers import Channel, messages


def check(schedule: Schedule) -> None:
    """Raise UserError with a sentence that names rank, action and rule where a schedule breaks one."""
    for rule in (_ranges, _pairs, _each_once, _order, _queues, _progress):
        for broken in rule(schedule):
            raise UserError(f"in schedule `{schedule.name}` {broken}")


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most (microbatch, stage) whose activations are held at once.

    From their F to the end of their B, or of their W where there is one; a pair holds both of its.
    """
    peaks = []
    for slots in schedule.slots:
        held = peak = 0
        for slot in slots:
            held += sum(action.kind == "F" for action in slot)
            peak = max(peak, held)
            held -= sum(schedule.is_last(action) for action in slot)
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
    for action in _due(schedule, backward=any(action.kind == "B" for action in runs)):
        if runs[action] != 1:
            holders = [str(rank) for rank in ranks if action.stage in schedule.stages[rank]]
            each = "for each B without its weights" if action.kind == "W" else "for each microbatch and stage"
            yield (
                f"rank {' or '.join(holders)} runs {action} {runs[action]} times, "
                f"but every {action.kind} runs once {each}"
            )


def _due(schedule: Schedule, *, backward: bool) -> Iterator[Action]:
    """What must run once."""
    for kind in KINDS[: 2 if backward else 1]:
        for microbatch, stage in product(range(schedule.num_microbatches), range(schedule.num_stages)):
            yield Action(kind, microbatch, stage)
    for microbatch, stage in sorted(schedule.apart):
        yield Action("W", microbatch, stage)


def _order(schedule: Schedule) -> Iterator[str]:
    for rank, slots in enumerate(schedule.slots):
        done: set[Action] = set()
        for slot in slots:
            for action in slot:
                kind = action.kind
                before = KINDS[KINDS.index(kind) - 1]
                if kind != "F" and replace(action, kind=before) not in done:
                    yield f"rank {rank} runs {action}, but a {kind} follows its {before} in an earlier slot"
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
    position = [0] * schedule.num_ranks
    done: set[Action] = set()
    for rank, index in possible_order(schedule):
        position[rank] = index + 1
        done.update(schedule.slots[rank][index])
    for rank, slots in enumerate(schedule.slots):
        for slot in slots[position[rank] :][:1]:
            missing = next(source for source in schedule.sources(slot) if source not in done)
            action = next(action for action in slot if schedule.source(action) == missing)
            yield f"rank {rank} waits for ever to run {action}, but what it needs, {missing}, must come first"
