"""1F1B and GPipe against `torch.distributed.pipelining`: the same order of calls, losses and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from parallel.collectives import Splits
from parallel.pipeline.action import Schedule
from parallel.pipeline.executor import execute
from parallel.pipeline.gpipe import gpipe
from parallel.pipeline.link import connect
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.tape import Direct, run
from tests.parallel.pipeline.toy import BOUNDARY, ToyStage, toy_loss, toy_microbatches, toy_place, toy_stages
from tests.ranks import run_ranks

OURS: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}
THEIRS = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
CPU = torch.device("cpu")


class Plain(nn.Module):
    """A stage's layers under ordinary autograd."""

    def __init__(self, stage: ToyStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.stage.layers.values():
            rows = run(layer.phases(Direct(), rows, self.stage.splits))
        return rows


def measured(stage: PipelineStage) -> list[str]:
    """The forwards and backwards that a torch schedule will make of a stage, as they happen."""
    log: list[str] = []

    def logged(letter: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda number, *args, **kwargs: (
            log.append(f"{letter}{number}"),
            function(number, *args, **kwargs),
        )[1]

    stage.forward_one_chunk = logged("F", stage.forward_one_chunk)
    stage.backward_one_chunk = logged("B", stage.backward_one_chunk)
    return log


def both(rank: int, world_size: int, name: str, number: int) -> list[Any]:
    """(order of actions, losses, gradients) of theirs and of ours."""
    place, microbatches = toy_place(rank, world_size, world_size), toy_microbatches(number)
    (stage,) = toy_stages(world_size, [rank], Splits((4,), (4,), None)).values()

    theirs = PipelineStage(Plain(stage), rank, world_size, CPU, group=place.pipeline)
    log, losses = measured(theirs), []
    schedule = THEIRS[name](theirs, number, loss_fn=toy_loss, scale_grads=False)
    rows, target = (torch.cat(values) for values in zip(*microbatches, strict=True))
    schedule.step(*((rows,) if rank == 0 else ()), target=target, losses=losses)
    found = [(" ".join(log), [loss.detach() for loss in losses], gradients(stage))]

    ours = OURS[name](world_size, number)
    link = connect(ours, place.pipeline, CPU)
    returned = execute(ours, {rank: stage}, microbatches, link=link, boundary=BOUNDARY).returned.values()
    words = str(ours).splitlines()[1 + rank].split(": ")[1]
    return [*found, (words, [loss for loss in returned if loss is not None], gradients(stage))]


def gradients(stage: ToyStage) -> list[Tensor]:
    found = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    stage.zero_grad()
    return found


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_ranks", "number"), [(2, 2), (2, 5), (3, 8)])
def test_the_same_as_torch(name: str, num_ranks: int, number: int) -> None:
    results = run_ranks(num_ranks, both, name, number)
    for theirs, ours in results:
        assert theirs[0] == ours[0]
        for expected, found in zip(theirs[1:], ours[1:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert len(ours[2]) > 0
    assert len(results[-1][1][1]) == number
