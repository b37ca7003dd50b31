"""Phases on a tape: forward as straight-line code, backward derived from what was recorded.

A microbatch's forward is a generator that calls `tape.compute(function, ...)` and
`tape.exchange(rows, splits)` and yields whenever its rows are on the wire. Every compute phase runs
on detached leaves, so its backward is autograd on that phase alone; an exchange's backward is the
reverse exchange. The backward is a generator too, and yields when all that is left to do waits for
the wire. Nothing is kept on a module: two microbatches can be in flight at once.

`Direct` offers the same calls through ordinary autograd, for inference and for use in a notebook.
"""

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.collectives import Splits, Wire, all_to_all, start_all_to_all

Steps = Generator[None, None, Any]


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
        self.tape._records.append(_Exchange(self.splits, [self.rows], [received]))
        return received


class Tape:
    """The record of one microbatch on one stage; its backward can be walked once."""

    def __init__(self, *, recompute: bool = False) -> None:
        self._records: list[_Compute | _Exchange] = []
        self._recompute = recompute

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a phase on leaves and record it. With recomputation its graph is thrown away."""
        with torch.enable_grad():
            returned = function(*inputs)
        values = returned if isinstance(returned, tuple) else (returned,)
        results = _differentiable(values)
        leaves = {id(v): v.detach().requires_grad_() for v in results}
        sources = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
        graph = None if self._recompute else results
        kept = inputs if self._recompute else ()  # only recomputation needs them again
        self._records.append(_Compute(function, kept, sources, [leaves[id(v)] for v in results], graph))
        passed = tuple(leaves.get(id(v), v) for v in values)
        return passed if isinstance(returned, tuple) else passed[0]

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        """Put rows on the wire; recorded when they have arrived."""
        return _Arrival(self, rows, splits, start_all_to_all(rows.detach(), splits))

    def root(self, value: Tensor, gradient: float) -> None:
        """Begin the backward at a scalar with this gradient."""
        if value.requires_grad:
            value.grad = torch.full_like(value, gradient)

    def backward(self) -> Steps:
        """Walk the records backwards; weight and input gradients are accumulated where they belong.

        The order depends on the records alone, never on timing, so that stepping this generator
        beside another one changes no bit of any gradient.
        """
        readers = Counter(id(leaf) for record in self._records for leaf in record.inputs)
        in_flight: list[tuple[Tensor, Wire]] = []
        while self._records:
            awaited = {id(leaf) for leaf, _ in in_flight}
            place = self._last_ready(readers, awaited)
            if place is None:
                yield
                leaf, wire = in_flight.pop(0)
                _add_gradient(leaf, wire.wait())
                continue
            record = self._records.pop(place)
            readers.subtract(id(leaf) for leaf in record.inputs)
            if isinstance(record, _Exchange):
                (leaf,), (output,) = record.inputs, record.outputs
                # An unused output still takes part: every rank must make the same exchanges.
                gradient = torch.zeros_like(output) if output.grad is None else output.grad
                in_flight.append((leaf, start_all_to_all(gradient, record.splits.reversed())))
            else:
                _compute_backward(record)
        for leaf, wire in in_flight:
            _add_gradient(leaf, wire.wait())

    def _last_ready(self, readers: Counter[int], awaited: set[int]) -> int | None:
        for place in range(len(self._records) - 1, -1, -1):
            if all(
                not readers[id(leaf)] and id(leaf) not in awaited for leaf in self._records[place].outputs
            ):
                return place
        return None


def _differentiable(values: tuple[Any, ...]) -> list[Tensor]:
    """The results that a gradient can reach, each once."""
    found = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    return list({id(value): value for value in found}.values())


def _compute_backward(record: _Compute) -> None:
    results = record.results
    if results is None:
        with torch.enable_grad():
            returned = record.function(*record.arguments)
        values = returned if isinstance(returned, tuple) else (returned,)
        results = _differentiable(values)
    pairs = [
        (result, leaf.grad)
        for result, leaf in zip(results, record.outputs, strict=True)
        if leaf.grad is not None
    ]
    if pairs:
        torch.autograd.backward([result for result, _ in pairs], [grad for _, grad in pairs])


def _add_gradient(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
