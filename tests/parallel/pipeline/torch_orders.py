"""The orders of `torch.distributed.pipelining`, as schedules of ours."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.pipeline.action import Action, Kind, Schedule

MULTI: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
# Their I is a backward without the weight gradients; torch itself refuses an order with an I but no W.
OUR_KIND: dict[str, Kind] = {"F": "F", "B": "B", "I": "B", "W": "W"}


def torch_order(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The order of a schedule with two stages on each rank."""
    theirs = MULTI[name]([stand_in(2 * num_ranks, num_ranks)] * 2, num_microbatches)
    return converted(name, num_microbatches, theirs.pipeline_order)


def stand_in(num_stages: int, num_ranks: int) -> Any:
    """All that an order needs of a stage, where nothing runs."""
    return SimpleNamespace(num_stages=num_stages, group_size=num_ranks, group_rank=0, submod=None)


def converted(name: str, num_microbatches: int, order: dict[int, list[Any]]) -> Schedule:
    """Our value of their table: without pauses and REDUCE_GRAD, and OVERLAP_F_B is a slot of two."""
    steps = [[step for step in order[rank] if step and step.is_compute_op] for rank in range(len(order))]
    slots = tuple(tuple(tuple(_actions(step)) for step in mine) for mine in steps)
    held = [dict.fromkeys(action.stage for slot in mine for action in slot) for mine in slots]
    return Schedule(name, num_microbatches, tuple(tuple(stages) for stages in held), slots)


def _actions(step: Any) -> Iterator[Action]:
    for part in step.sub_actions or (step,):
        yield Action(OUR_KIND[part.computation_type.value], part.microbatch_index, part.stage_index)
