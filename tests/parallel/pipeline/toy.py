"""A small model in stages, with an uneven exchange in every layer, for the tests of the pipeline."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import Group, Splits, group_rank, group_size
from parallel.linear import linear
from parallel.pipeline.link import Boundary
from parallel.pipeline.tape import Recorder, Steps

ROWS, WIDTH, NUM_LAYERS = 4, 6, 3
BOUNDARY = Boundary((ROWS, WIDTH), torch.float32, torch.device("cpu"))
SENT = {1: [[4]], 2: [[1, 3], [4, 0]]}  # rows from a rank to a rank, by the size of the group


class ToyMicrobatch(NamedTuple):
    rows: Tensor
    target: Tensor


def toy_microbatches(number: int, seed: int = 0) -> list[ToyMicrobatch]:
    stream = torch.Generator().manual_seed(seed)
    return [ToyMicrobatch(*torch.randn(2, ROWS, WIDTH, generator=stream)) for _ in range(number)]


def toy_splits(group: Group) -> Splits:
    sent, rank = SENT[group_size(group)], group_rank(group)
    return Splits(tuple(sent[rank]), tuple(row[rank] for row in sent), group)


class ToyLayer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(number)
        for name in ("first", "beside", "away"):
            weight = torch.randn(WIDTH, WIDTH, generator=stream) / WIDTH**0.5
            self.register_parameter(name, nn.Parameter(weight))

    def phases(self, tape: Recorder, hidden: Tensor, splits: Splits) -> Steps:
        mixed = tape.compute(lambda rows: linear(rows, self.first).tanh(), hidden)
        sent = tape.exchange(mixed, splits)
        beside = tape.compute(lambda rows: linear(rows, self.beside), hidden)
        yield
        returned = tape.exchange(
            tape.compute(lambda rows: linear(rows, self.away).sin(), sent.wait()), splits.reversed()
        )
        yield
        return tape.compute(lambda *parts: sum(parts), hidden, beside, returned.wait())


class ToyStage(nn.Module):
    """Layers `begin` .. `end` - 1 of the model; the last stage has the losses."""

    def __init__(self, begin: int, end: int, *, is_last: bool, splits: Splits) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): ToyLayer(number) for number in range(begin, end)})
        self.is_last, self.splits = is_last, splits

    def phases(self, tape: Recorder, microbatch: ToyMicrobatch, hidden: Tensor | None) -> Steps:
        hidden = microbatch.rows if hidden is None else hidden
        for name, layer in self.layers.items():
            tape.unit(name)
            hidden = yield from layer.phases(tape, hidden, self.splits)
        if not self.is_last:
            return hidden, None
        loss = tape.compute(toy_loss, hidden, microbatch.target)
        tape.root(loss, 1.0)
        return None, loss.detach()


def toy_loss(hidden: Tensor, target: Tensor) -> Tensor:
    return (hidden - target).square().mean()


def toy_cut(num_stages: int, stage: int) -> tuple[int, int]:
    """The layers of a stage: uneven, and where there are more stages than layers some are empty."""
    return NUM_LAYERS * stage // num_stages, NUM_LAYERS * (stage + 1) // num_stages


def toy_stages(num_stages: int, held: Sequence[int], splits: Splits) -> dict[int, ToyStage]:
    return {
        stage: ToyStage(*toy_cut(num_stages, stage), is_last=stage == num_stages - 1, splits=splits)
        for stage in held
    }


class ToyPlace(NamedTuple):
    pipeline: Group
    experts: Group
    column: int  # which of the pipelines beside each other


def toy_place(rank: int, world_size: int, num_ranks: int) -> ToyPlace:
    """Pipelines of `num_ranks` beside each other; the ranks of one stage exchange rows."""
    beside = world_size // num_ranks
    pipelines = [dist.new_group(range(column, world_size, beside)) for column in range(beside)]
    experts = [dist.new_group(range(row * beside, (row + 1) * beside)) for row in range(num_ranks)]
    column = rank % beside
    return ToyPlace(
        pipelines[column] if num_ranks > 1 else None, experts[rank // beside] if beside > 1 else None, column
    )
