"""Our executor against the runtime of `torch.distributed.pipelining`, on the same stages and gloo ranks.

The same actions in the same order as they happen, the same losses to the bit, and the same gradients but
for rounding in float64: theirs makes a product and adds it to `grad`, ours adds the product to `main_grad`
in one operation, which rounds once less. Without `main_grad` no weight gradient would wait for its W.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from parallel.collectives import Group
from parallel.linear import linear
from parallel.pipeline.action import Schedule
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.executor import execute
from parallel.pipeline.gpipe import gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.link import Boundary, connect
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.tape import Recorder, Steps
from tests.parallel.pipeline.torch_orders import MULTI, torch_order
from tests.parallel.pipeline.toy import ROWS, WIDTH, ToyMicrobatch, toy_loss, toy_microbatches, toy_place
from tests.ranks import run_ranks

OURS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": lambda ranks, number: interleaved(ranks, number, 2),
    "dualpipev": dualpipev,
    "zbv": lambda ranks, number: torch_order("zbv", ranks, number),  # walked by our executor
    "interleaved-zb": lambda ranks, number: torch_order("interleaved-zb", ranks, number),
}
THEIRS: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, **MULTI}
CPU = torch.device("cpu")
BOUNDARY = Boundary((ROWS, WIDTH), torch.float64, CPU)


def layer(product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, rows: Tensor) -> Tensor:
    return rows + product(rows, weight).tanh()


class Part(nn.Module):
    """Two layers: with `forward` for theirs, as phases for ours."""

    def __init__(self, stage: int, *, is_last: bool) -> None:
        super().__init__()
        stream, self.is_last = torch.Generator().manual_seed(stage), is_last
        values = torch.randn(2, WIDTH, WIDTH, generator=stream, dtype=torch.float64)
        self.weights = nn.ParameterList(value.clone() for value in values)

    def forward(self, rows: Tensor) -> Tensor:
        for weight in self.weights:
            rows = layer(F.linear, weight, rows)
        return rows

    def phases(self, tape: Recorder, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
        rows = microbatch.rows if hidden is None else hidden
        for weight in self.weights:
            rows = tape.compute(partial(layer, linear, weight), rows)
            yield
        if not self.is_last:
            return rows, None
        loss = tape.compute(toy_loss, rows, microbatch.target)
        tape.root(loss, 1.0)
        return None, loss.detach()


def listen(stage: Any, primes: str, log: list[str]) -> None:
    """Write down what a torch schedule makes of a stage, in our words, as it happens."""

    def logged(letter: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(number: int, *args: Any, **kwargs: Any) -> Any:
            log.append(f"{letter}{number}{primes}")
            return function(number, *args, **kwargs)

        return call

    stage.forward_one_chunk = logged("F", stage.forward_one_chunk)
    stage.backward_one_chunk = logged("B", stage.backward_one_chunk)
    stage.backward_weight_one_chunk = logged("W", stage.backward_weight_one_chunk)


Found = tuple[list[str], list[Tensor], list[Tensor]]  # actions in order, losses, gradients


def both(rank: int, world_size: int, name: str, number: int) -> tuple[Found, Found]:
    """What this rank found with theirs and with ours."""
    schedule, place = OURS[name](world_size, number), toy_place(rank, world_size, world_size)
    count = schedule.num_stages
    parts = {stage: Part(stage, is_last=stage == count - 1) for stage in schedule.stages[rank]}
    drawn = toy_microbatches(number)
    microbatches = [ToyMicrobatch(rows.double(), target.double()) for rows, target in drawn]
    theirs = run_theirs(name, parts, count, microbatches, place.pipeline)

    weights: list[Any] = [weight for part in parts.values() for weight in part.parameters()]
    for weight in weights:
        weight.grad, weight.main_grad = None, torch.zeros_like(weight)
    link = connect(schedule, place.pipeline, CPU)
    returned = execute(schedule, parts, microbatches, link=link, boundary=BOUNDARY).returned
    losses = [returned[i, count - 1] for i in range(number) if (i, count - 1) in returned]
    assert all(weight.grad is None for weight in weights)
    return theirs, (schedule.serial().words(rank), losses, [weight.main_grad for weight in weights])


def run_theirs(
    name: str, parts: dict[int, Part], count: int, microbatches: list[ToyMicrobatch], group: Group
) -> Found:
    """Walk these parts of so many stages with torch."""
    stages = [PipelineStage(part, stage, count, CPU, group=group) for stage, part in parts.items()]
    log: list[str] = []
    for index, stage in enumerate(stages):
        listen(stage, "'" * index, log)
    held = stages if name in MULTI else stages[0]
    schedule = THEIRS[name](held, len(microbatches), loss_fn=toy_loss, scale_grads=False)
    rows, target = (torch.cat(values) for values in zip(*microbatches, strict=True))
    losses: list[Tensor] = []
    schedule.step(*((rows,) if 0 in parts else ()), target=target, losses=losses)
    gradients: list[Any] = [weight.grad for part in parts.values() for weight in part.parameters()]
    return log, [loss.detach() for loss in losses], gradients


@pytest.mark.parametrize(
    ("name", "ranks", "number"),
    [
        *(("gpipe", 2, 2), ("gpipe", 3, 8), ("1f1b", 2, 2), ("1f1b", 2, 5), ("1f1b", 3, 8)),
        *((name, ranks, 8) for name in ("1f1b", *MULTI) for ranks in (2, 4)),
    ],
)
def test_the_same_as_torch(name: str, ranks: int, number: int) -> None:
    num_losses = 0
    for theirs, ours in run_ranks(ranks, both, name, number):
        (order, losses, gradients), (our_order, our_losses, our_gradients) = theirs, ours
        assert our_order == order
        torch.testing.assert_close(our_losses, losses, rtol=0, atol=0)
        torch.testing.assert_close(our_gradients, gradients, rtol=1e-12, atol=1e-12)
        assert all(gradient.abs().max() > 1e-3 for gradient in our_gradients)
        num_losses += len(our_losses)
    assert num_losses == number
