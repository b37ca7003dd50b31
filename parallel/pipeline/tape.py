"""Phases on a tape: forward as straight-line code, backward derived from what was recorded.

A microbatch's forward is a generator that calls `tape.compute(function, ...)` and
`tape.exchange(rows, splits)` and yields whenever its rows are on the wire. Every compute phase runs
on detached leaves, so its backward is autograd on that phase alone; an exchange's backward is the
reverse exchange. The backward is a generator too, and yields when all that is left to do waits for
the wire. Nothing is kept on a module: two microbatches can be in flight at once.

Weight gradients are nobody's input, so the backward leaves them for when it waits for the wire, for a
unit later at most, and the last ones, or all, to `weights`. Where there is no wire to wait for it makes
them at once, while what they are made of is in the cache.

A model names its *units* (embedding, blocks, head) as it enters them. `on_enter` hears of it at once, to
wait for parameters that are still being gathered; `on_leave` hears of it in the backward when the unit's
gradients are whole, to begin their reduction.

`Direct` offers the same calls through ordinary autograd, for inference and for use in a notebook.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable

from parallel.collectives import Splits, Wire, all_to_all, start_all_to_all
from parallel.linear import Queue, deferring

Steps = Generator[None, None, Any]
OnUnit = Callable[[str], None]


def moment(device: torch.device) -> Any:
    """Now, as `seconds` takes it: on CUDA an event in the stream, and nobody waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Any, end: Any) -> float:
    """The time between two moments of one device; on CUDA this waits until the device has passed both."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def run(steps: Steps) -> Any:
    """Step a generator to its end and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


class Arrival(Protocol):
    """Rows that will be here."""

    def wait(self) -> Tensor:
        """The rows, once they are here."""
        ...


class Recorder(Protocol):
    """What a layer's phases are written against: a `Tape` or `Direct`."""

    def unit(self, name: str) -> None:
        """A unit of the model begins here: said once for each, before anything reads its parameters."""
        ...

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a phase: tensors and other values in, a tensor, another value or a tuple of these out."""
        ...

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        """Put rows on the wire."""
        ...

    def root(self, value: Tensor, gradient: float) -> None:
        """Let the backward begin at a scalar, with this gradient of the objective."""
        ...


class Direct:
    """The same calls without a tape: autograd runs straight through, exchanges wait."""

    def __init__(self, on_enter: OnUnit | None = None) -> None:
        self._on_enter = on_enter

    def unit(self, name: str) -> None:
        """Tell that the unit is entered."""
        if self._on_enter is not None:
            self._on_enter(name)

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run the phase."""
        return function(*inputs)

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        """Exchange the rows now."""
        return Wire(all_to_all(rows, splits), rows, None)

    def root(self, value: Tensor, gradient: float) -> None:
        """Nothing to record: whoever differentiates brings an objective of their own."""


@dataclass
class _Compute:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    inputs: list[Tensor]
    outputs: list[Tensor]
    results: list[Tensor] | None  # with their graph; None: run again before the backward


@dataclass
class _Exchange:
    splits: Splits
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass
class _Unit:
    name: str
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Arrival:
    tape: "Tape"
    rows: Tensor
    splits: Splits
    wire: Wire

    def wait(self) -> Tensor:
        received = self.wire.wait()
        if not self.rows.requires_grad:
            return received
        received = received.detach().requires_grad_()
        self.tape._record(_Exchange(self.splits, [self.rows], [received]))
        return received


class Tape:
    """The record of one microbatch on one stage: `backward` once, and after it `weights`."""

    def __init__(
        self,
        *,
        recompute: bool = False,
        on_enter: OnUnit | None = None,
        on_leave: OnUnit | None = None,
    ) -> None:
        self._records: dict[int, _Compute | _Exchange | _Unit] = {}  # by their number, in order
        self._recompute, self._on_enter, self._on_leave = recompute, on_enter, on_leave
        self._later = Queue()  # weight gradients, and the leaving of units whose last ones they are
        self._left = 0  # units that are left in that queue

    def _record(self, record: _Compute | _Exchange | _Unit) -> None:
        self._records[len(self._records)] = record

    def unit(self, name: str) -> None:
        """Tell that the unit is entered, and record it."""
        if self._on_enter is not None:
            self._on_enter(name)
        self._record(_Unit(name))

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a phase on leaves and record it. With recomputation its graph is thrown away."""
        with torch.enable_grad(), deferring(self._later):
            returned = function(*inputs)
        values = returned if isinstance(returned, tuple) else (returned,)
        results = _differentiable(values)
        leaves = {id(v): v.detach().requires_grad_() for v in results}
        sources = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
        graph = None if self._recompute else results
        kept = inputs if self._recompute else ()  # only recomputation needs them again
        self._record(_Compute(function, kept, sources, [leaves[id(v)] for v in results], graph))
        passed = tuple(leaves.get(id(v), v) for v in values)
        return passed if isinstance(returned, tuple) else passed[0]

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        """Put rows on the wire; recorded when they have arrived."""
        return _Arrival(self, rows, splits, start_all_to_all(rows.detach(), splits))

    def root(self, value: Tensor, gradient: float | Tensor) -> None:
        """Begin the backward at a scalar with this gradient, or anywhere with one of the same shape."""
        if value.requires_grad:
            seed = gradient if isinstance(gradient, Tensor) else torch.full_like(value, gradient)
            _add_gradient(value, seed)

    def backward(self, *, weights_apart: bool = False) -> Steps:
        """Walk the records backwards. With `weights_apart` no weight gradient is made on the way,
        except what puts none off (parallel/head.py).

        The order depends on the records alone, never on timing, so that stepping this generator
        beside another one changes no bit of any gradient.
        """
        records = self._records.values()
        readers = Counter(id(leaf) for record in records for leaf in record.inputs)
        waits = any(isinstance(record, _Exchange) and record.splits.group for record in records)
        self._later.is_open = weights_apart or waits
        in_flight: list[tuple[int, Tensor, Wire]] = []
        while self._records:
            number = self._last_ready(readers, in_flight)
            if number is None:
                if not weights_apart:
                    self.weights()
                yield
                while in_flight and self._last_ready(readers, in_flight) is None:
                    _, leaf, wire = in_flight.pop(0)
                    _add_gradient(leaf, wire.wait())
                continue
            record = self._records.pop(number)
            readers.subtract(id(leaf) for leaf in record.inputs)
            if isinstance(record, _Unit):
                if self._left and not weights_apart:  # a whole unit has passed with nothing to wait for
                    self.weights()
                self._leave(record.name)
            elif isinstance(record, _Exchange):
                (leaf,), (output,) = record.inputs, record.outputs
                # An unused output still takes part: every rank must make the same exchanges.
                gradient = torch.zeros_like(output) if output.grad is None else output.grad
                wire = start_all_to_all(gradient, record.splits.reversed())
                in_flight.append((number, leaf, wire))
            else:
                self._compute_backward(record)
        for _, leaf, wire in in_flight:
            _add_gradient(leaf, wire.wait())

    @torch.no_grad()
    def weights(self) -> None:
        """Make the weight gradients that are left, in the backward's order."""
        self._left = 0
        while self._later:
            self._later.popleft()()

    def _leave(self, unit: str) -> None:
        if self._on_leave is not None:
            self._later.append(partial(self._on_leave, unit))
        self._left += 1

    def _compute_backward(self, record: _Compute) -> None:
        results = record.results
        if results is None:
            with torch.enable_grad(), deferring(self._later):
                returned = record.function(*record.arguments)
            values = returned if isinstance(returned, tuple) else (returned,)
            results = _differentiable(values)
        pairs = [
            (result, leaf.grad)
            for result, leaf in zip(results, record.outputs, strict=True)
            if leaf.grad is not None
        ]
        if pairs:
            _run_backward(*zip(*pairs, strict=True))

    def _last_ready(self, readers: Counter[int], in_flight: list[tuple[int, Tensor, Wire]]) -> int | None:
        """The last record whose outputs have all their gradient; a unit's, when all behind it is done."""
        awaited = {id(leaf) for _, leaf, _ in in_flight}
        behind = max((number for number, _, _ in in_flight), default=-1)
        for number, record in reversed(self._records.items()):
            # A later record that is left waits, by way of its readers, for an exchange behind this one.
            if isinstance(record, _Unit) and number < behind:
                continue
            if all(not readers[id(leaf)] and id(leaf) not in awaited for leaf in record.outputs):
                return number
        return None


def _differentiable(values: tuple[Any, ...]) -> list[Tensor]:
    """The results that a gradient can reach, each once."""
    found = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    return list({id(value): value for value in found}.values())


def _run_backward(results: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward`, which would import sympy to compare shapes: half a second of every rank."""
    Variable._execution_engine.run_backward(
        results, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _add_gradient(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
