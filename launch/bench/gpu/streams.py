"""How much of an all-to-all hides behind compute on this card, with the other ranks emulated.

The exchange becomes a copy on a second stream that is stretched to the time which its bytes take at a given
rate: chunks are copied, and between them the stream waits. On one card that shows what the schedule can hide
and what ordering by streams costs. It flatters in one respect: NCCL's kernels also take multiprocessors,
which these copies hardly do. On the CPU the waiting is the host's.

Layers are told of a group of one rank: without any they would send nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from launch.bench.gpu.exact import with_buffers
from launch.bench.gpu.layers import fill
from launch.bench.gpu.parts import Bench, Missing, Row
from launch.bench.gpu.shapes import TOKENS, V2_LITE
from launch.bench.gpu.timer import Lap
from moe.config import ModelConfig
from moe.model import dispatch
from moe.model.layer import MoELayer
from moe.model.transformer import Microbatch, Transformer
from parallel.collectives import ModelGroups, Splits, Wire
from parallel.pipeline import tape as tapes
from parallel.pipeline.overlap import run_pair
from parallel.pipeline.tape import Tape, moment, run, seconds

CHUNKS = 8
MICROBATCHES = 4
PAIRED = (MICROBATCHES - 1) / MICROBATCHES  # of the work that has a partner to hide behind
# Bytes a second and direction, as vendors give them: what is emulated, not what was measured.
LINKS: dict[str, float] = {
    "NVLink of H100, 450 GB/s": 450e9,
    "NVLink of H800, 200 GB/s": 200e9,
    "InfiniBand, 50 GB/s": 50e9,
}
TINY_LINKS = {"tiny": 1e8}
TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_dense_layers=0,
    intermediate_size=64,
    moe_intermediate_size=16,
)


@dataclass
class _HostWork:
    """The CPU's wire: rows are there at a certain time."""

    until: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.until - time.perf_counter()))


@dataclass
class _StreamWork:
    arrived: Any  # event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.arrived)


class Link:
    """Stands in for `start_all_to_all`: all rows travel, and come back as they were.

    `copy_rate`: bytes that the card reads and writes in a second when it copies, which is a part of the time.
    """

    def __init__(self, device: torch.device, bytes_per_second: float, copy_rate: float) -> None:
        self._rate, self._copy_rate, self.seconds = bytes_per_second, copy_rate, 0.0
        self._is_card = device.type == "cuda"
        if self._is_card:
            if not hasattr(torch.cuda, "_sleep"):
                raise Missing(f"torch {torch.__version__} cannot keep a stream waiting")
            self._stream = torch.cuda.Stream(device)
            self._cycles = _cycles_per_second(device)

    def start(self, rows: Tensor, splits: Splits) -> Wire:
        """Put rows on the wire."""
        rows = rows.contiguous()
        taken = rows.nbytes / self._rate
        self.seconds += taken
        if not self._is_card:
            return Wire(rows.clone(), rows, _HostWork(time.perf_counter() + taken))
        received = torch.empty_like(rows)
        return Wire(received, rows, self.send(rows, received))

    def send(self, source: Tensor, target: Tensor, times: int = 1) -> _StreamWork:
        """Copy so often on the second stream, which takes as long as the rate says."""
        waiting = max(0.0, source.nbytes / self._rate - 2 * source.nbytes / self._copy_rate)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            pairs = list(zip(source.chunk(CHUNKS), target.chunk(CHUNKS), strict=True))
            for part, place in pairs * times:
                place.copy_(part)
                torch.cuda._sleep(int(self._cycles * waiting / len(pairs)))
            arrived = torch.cuda.Event()
            arrived.record()
        return _StreamWork(arrived)


def _link(bench: Bench, rate: float) -> Link:
    copied = bench.value("ceilings", "copy on the device", "GB/s")
    return Link(bench.device, rate, 1e9 * copied if copied else float("inf"))


def _cycles_per_second(device: torch.device) -> float:
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    begin = moment(device)
    torch.cuda._sleep(cycles)
    return cycles / seconds(begin, moment(device))


@contextmanager
def linked(link: Link | None) -> Iterator[None]:
    """Rows that are sent travel by a link or arrive at once; their counts, which are few, always do."""
    rows = link.start if link else _arrived
    with patch.object(tapes, "start_all_to_all", rows), patch.object(dispatch, "start_all_to_all", _arrived):
        yield


def _arrived(rows: Tensor, splits: Splits) -> Wire:
    return Wire(rows, rows, None)


def in_group(model: Transformer) -> Transformer:
    """Its layers send rows to their experts as a rank of a group does, though they hold all of them."""
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # which cannot communicate
    for each in model.modules():
        if isinstance(each, MoELayer):
            each.groups = ModelGroups(ep_etp=group)
    return model


def rows(bench: Bench) -> Iterator[Row]:
    """For each link: compute and exchange alone, one after the other, and in turn."""
    config = TINY if bench.tiny else replace(V2_LITE, num_layers=2, num_dense_layers=0, vocab_size=8192)
    with torch.device(bench.device):
        model = in_group(Transformer(config, dtype=torch.bfloat16, seed=None))
    fill(model, config.init_std)
    with_buffers(model)
    batches = [_batch(bench, config) for _ in range(MICROBATCHES)]
    for name, rate in (TINY_LINKS if bench.tiny else LINKS).items():
        yield _row(bench, model, batches, name, rate)
    yield _slow_down(bench, model, batches)


def _batch(bench: Bench, config: ModelConfig) -> Microbatch:
    length = 32 if bench.tiny else TOKENS
    text = torch.randint(config.vocab_size, (1, length + 1), device=bench.device)
    valid = torch.ones(1, length, dtype=torch.bool, device=bench.device)
    return Microbatch(tokens=text[:, :-1], labels=text[:, 1:], valid=valid, loss_weights=(1 / length,))


def serial(model: Transformer, batches: list[Microbatch]) -> None:
    """Forward and backward of one microbatch after the other."""
    for batch in batches:
        tape = Tape()
        run(model.phases(tape, batch))
        run(tape.backward())
        tape.weights()


def in_turn(model: Transformer, batches: list[Microbatch]) -> None:
    """Each backward is stepped in turn with the next microbatch's forward."""
    before = Tape()
    run(model.phases(before, batches[0]))
    for batch in batches[1:]:
        after = Tape()
        run_pair(before.backward(), model.phases(after, batch))
        before.weights()
        before = after
    run(before.backward())
    before.weights()


def _row(bench: Bench, model: Transformer, batches: list[Microbatch], name: str, rate: float) -> Row:
    def over(
        walk: Callable[[Transformer, list[Microbatch]], None], link: Link | None
    ) -> Callable[[Lap], None]:
        def work(lap: Lap) -> None:
            with linked(link):
                walk(model, batches)

        return work

    link = _link(bench, rate)
    over(serial, link)(lambda: None)
    exchange = link.seconds  # of one walk
    taken = bench.timer.compare(
        {"compute": over(serial, None), "serial": over(serial, link), "in turn": over(in_turn, link)}
    )
    (compute,), (one_by_one,), (turns,) = taken["compute"], taken["serial"], taken["in turn"]
    return Row(
        name=name,
        values={
            "compute ms": 1e3 * compute,
            "exchange ms": 1e3 * exchange,
            "serial ms": 1e3 * one_by_one,
            "in turn ms": 1e3 * turns,
            "hidden share": hidden_share(compute, exchange, turns),
        },
        note=f"{MICROBATCHES} microbatches, of whose work {PAIRED:.0%} has a partner",
    )


def hidden_share(compute: float, exchange: float, together: float) -> float:
    """Of what could be hidden: the shorter of the two, as far as it has a partner."""
    return (compute + exchange - together) / (min(compute, exchange) * PAIRED)


def _slow_down(bench: Bench, model: Transformer, batches: list[Microbatch]) -> Row:
    """How much longer compute takes while a second stream copies all the time at the fastest link's rate."""
    name = "compute beside copies / alone"
    if bench.device.type != "cuda":
        return Row(name=name, note="skipped: no second stream on the CPU")
    rate = max(LINKS.values())
    link = _link(bench, rate)
    with linked(None):
        alone = bench.timer.seconds(lambda: serial(model, batches))
    source = torch.zeros(2**28, dtype=torch.bfloat16, device=bench.device)
    target, times = torch.empty_like(source), 1 + int(2 * alone * rate / source.nbytes)

    def beside(lap: Lap) -> None:
        copies = link.send(source, target, times)
        lap()
        with linked(None):
            serial(model, batches)
        lap()
        copies.wait()

    _, busy, _ = bench.timer.compare({"": beside})[""]
    return Row(name=name, values={"ratio": busy / alone}, note=f"copies at {1e-9 * rate:.0f} GB/s")
