"""Data parallelism with ZeRO stage 1 (1910.02054): copies of a parameter share the optimizer's work.

Parameters differ in which ranks hold their copies, so they come as (parameters, group) pairs. Each pair
is laid into flat buffers, one of weights and one of fp32 gradients, of which every copy owns an equal
shard; optimizer and checkpoint see only the owned shards. Pairs whose gradients are complete at the same
moment form a unit. A step is

    clear, backward with start_reduce(unit) as units are done, finish_reduce, norms (and clipping),
    the optimizer moves the masters, start_gather, arrive(unit) as the next forward enters each

On NCCL reductions and gathers are in place and overlap with compute; without copies nothing is sent.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.collectives import (
    Group,
    Wire,
    all_reduce,
    group_rank,
    group_size,
    start_all_gather,
    start_reduce_scatter,
)
from parallel.runs import runs

BUCKET_BYTES = 256 * 2**20  # of fp32 gradients; only a larger parameter makes a larger bucket
_NORM_ELEMENTS = 2**24  # of a gradient that are widened to fp64 at a time
_ALIGNMENT = 64  # elements: 128 bytes of bf16, what vectorised kernels and NCCL like best

Named = tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True)
class ParameterSet:
    """Named parameters whose copies live on the ranks of `replicas` (None: only here)."""

    named: Named
    replicas: Group


@dataclass(frozen=True)
class Segment:
    """The elements `begin` .. `begin` + n - 1 of a parameter, which this rank owns; flat views [n].

    `master` is what the optimizer moves, fp32: the very tensor `weight` where the parameter is fp32 too.
    """

    name: str
    parameter: nn.Parameter
    begin: int
    weight: Tensor
    master: Tensor
    grad: Tensor


class Zero:
    """Gives every trainable parameter a place in flat buffers and `main_grad`, an fp32 gradient view.

    `units` come in forward order; `world` is every rank that holds any of the model. Ranks that share a
    group pass the sets of that group in the same order, in which alone anything is sent: a rank and its
    mirror in a two-way pipeline must agree on one. Masters are made here, so weights are loaded before;
    the model is neither cast nor moved to another device afterwards.
    """

    def __init__(
        self,
        units: Sequence[tuple[str, Sequence[ParameterSet]]],
        world: Group,
        *,
        reduce_dtype: torch.dtype = torch.float32,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        named = [pair for _, sets in units for chosen in sets for pair in chosen.named]
        assert len({id(parameter) for _, parameter in named}) == len(named), "a parameter is in two sets"
        self._world = world
        self.device = named[0][1].device
        self._units = {
            name: [_Bucket(flat, reduce_dtype) for flat in flat_buffers(sets, bucket_bytes)]
            for name, sets in units
        }
        assert len(self._units) == len(units), "two units have one name"
        self._unsent = list(self._units)
        self._complete: set[str] = set()

    def clear(self) -> None:
        """Forget the gradients."""
        assert not self._complete, f"the gradients of {self._complete} are being summed"
        for bucket in self._buckets():
            bucket.clear()

    def start_reduce(self, unit: str) -> None:
        """A unit's gradients are complete: sum them over their replicas. Nobody adds to them from here on.

        Sums start in backward order whatever the order of calls, which may differ between replicas.
        """
        assert unit not in self._complete, f"the gradients of {unit} are being summed already"
        self._complete.add(unit)
        for bucket in self._units[unit]:
            bucket.close()
        while self._unsent and self._unsent[-1] in self._complete:
            for bucket in self._units[self._unsent.pop()]:
                bucket.start_reduce()

    def finish_reduce(self) -> None:
        """Wait for all sums, those of units not yet started too. They are valid in the owned shards only."""
        for unit in self._units.keys() - self._complete:
            self.start_reduce(unit)
        for bucket in self._buckets():
            bucket.finish_reduce()
        self._unsent = list(self._units)
        self._complete.clear()

    def norms(self, kinds: Sequence[str], kind_of: Callable[[str], str]) -> dict[str, float]:
        """The 2-norm of the whole model's gradient by kind of parameter. Same on every rank; all must call.

        Every element of the model is owned by exactly one rank of the world, whatever its replicas, so the
        squares of all owned shards, summed in fp64, are the one correct norm without weighing any of them.
        """
        totals = torch.zeros(len(kinds), dtype=torch.float64, device=self.device)
        for segment in self.segments():
            total = totals[kinds.index(kind_of(segment.name))]
            for part in segment.grad.split(_NORM_ELEMENTS):
                total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return dict(zip(kinds, all_reduce(totals, self._world).sqrt().tolist(), strict=True))

    def start_gather(self) -> None:
        """Round the moved masters to weights and start sharing them, in the order the forward needs them."""
        for bucket in self._buckets():
            bucket.start_gather()

    def arrive(self, unit: str) -> None:
        """Wait for a unit's weights. Nothing happens where none are on their way."""
        for bucket in self._units[unit]:
            bucket.arrive()

    def arrive_all(self) -> None:
        """Wait for all weights: before anything but a forward reads them."""
        for bucket in self._buckets():
            bucket.arrive()

    def segments(self) -> Iterator[Segment]:
        """What this rank owns. Over the replicas they tile every trainable parameter exactly once."""
        for bucket in self._buckets():
            yield from bucket.segments()

    def _buckets(self) -> Iterator["_Bucket"]:
        for buckets in self._units.values():
            yield from buckets


@dataclass(frozen=True)
class Flat:
    """A flat buffer in elements: all of it with its padding, one replica's shard of it, and of each
    parameter where it begins and the elements `owned` by this replica."""

    named: Named
    replicas: Group
    size: int
    shard: int
    begins: tuple[int, ...]
    owned: tuple[range, ...]


def lay_flat(named: Named, replicas: Group) -> Flat:
    """Where parameters lie in their flat buffer, aligned, and which of them this replica owns."""
    begins, end = [], 0
    for _, parameter in named:
        begins.append(end)
        end = _round_up(end + parameter.numel(), _ALIGNMENT)
    size = _round_up(end, _ALIGNMENT * group_size(replicas))
    shard = size // group_size(replicas)
    low = group_rank(replicas) * shard
    owned = tuple(
        range(max(begin, low), min(begin + parameter.numel(), low + shard))
        for (_, parameter), begin in zip(named, begins, strict=True)
    )
    return Flat(named, replicas, size, shard, tuple(begins), owned)


def flat_buffers(sets: Sequence[ParameterSet], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Flat]:
    """The buffers that a unit's trainable parameters are laid into. Makes none of them."""
    for chosen in sets:
        for part in _split(chosen.named, bucket_bytes):
            yield lay_flat(part, chosen.replicas)


class _Bucket:
    """Parameters of one dtype with the same replicas, in flat buffers of which each owns an equal shard."""

    def __init__(self, flat: Flat, reduce_dtype: torch.dtype) -> None:
        named, replicas = flat.named, flat.replicas
        self._flat, self._named, self._replicas, self._reduce_dtype = flat, named, replicas, reduce_dtype
        first = named[0][1]
        self._weights = torch.zeros(flat.size, dtype=first.dtype, device=first.device)
        self._grads = torch.zeros(flat.size, dtype=torch.float32, device=first.device)
        for (_, parameter), begin in zip(named, flat.begins, strict=True):
            place = slice(begin, begin + parameter.numel())
            weight = self._weights[place].view(parameter.shape)
            parameter.data = weight.copy_(parameter.detach())  # the object stays, with its marks
            parameter.main_grad = self._grads[place].view(parameter.shape)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_move_to_buffer)
        self._weight, self.grad = _shard(self._weights, replicas), _shard(self._grads, replicas)
        self._master = self._weight.float()  # itself where it is fp32
        self._reduction: Wire | None = None
        self._gather: Wire | None = None
        self._version = -1  # of the gradients when they were complete

    def clear(self) -> None:
        self._grads.zero_()

    def close(self) -> None:
        self._version = self._grads._version  # autograd counts the writes through any view

    def start_reduce(self) -> None:
        sent = self._grads if self._replicas is None else self._grads.to(self._reduce_dtype)
        self._reduction = _start_reduce_scatter(sent, self._replicas)

    def finish_reduce(self) -> None:
        assert self._reduction is not None
        assert self._grads._version == self._version, f"{self._named[0][0]}: gradient added while summed"
        total = self._reduction.wait()
        if total.dtype != self.grad.dtype:  # otherwise it was summed in place
            self.grad.copy_(total)
        self._reduction = None
        self.arrive()  # where no forward came by: the optimizer is about to move what is being sent

    def start_gather(self) -> None:
        assert self._gather is None, f"the weights of {self._named[0][0]} are on their way already"
        if self._master is not self._weight:
            self._weight.copy_(self._master)
        self._gather = _start_all_gather(self._weights, self._replicas)

    def arrive(self) -> None:
        if self._gather is not None:
            self._gather.wait()
            self._gather = None

    def segments(self) -> Iterator[Segment]:
        flat = self._flat
        low = group_rank(self._replicas) * flat.shard
        for (name, parameter), begin, owned in zip(self._named, flat.begins, flat.owned, strict=True):
            if owned:
                place = slice(owned.start - low, owned.stop - low)
                weight = self._weight[place]
                master = weight if self._master is self._weight else self._master[place]
                yield Segment(name, parameter, owned.start - begin, weight, master, self.grad[place])


def _split(named: Named, limit: int) -> Iterator[Named]:
    """The trainable parameters, apart by dtype, in runs of at most `limit` bytes of fp32 gradients."""
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for dtype in dict.fromkeys(parameter.dtype for _, parameter in trainable):
        alike = [(name, parameter) for name, parameter in trainable if parameter.dtype == dtype]
        for run in runs(alike, lambda pair: 4 * pair[1].numel(), limit):
            yield tuple(run)


def _move_to_buffer(parameter: Tensor) -> None:
    """Gradients that autograd makes itself (norm gains, embeddings) join those of the products."""
    if parameter.grad is not None:  # autograd calls this too when a product made the gradient itself
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def _shard(flat: Tensor, group: Group) -> Tensor:
    return flat.view(group_size(group), -1)[group_rank(group)]


def _start_reduce_scatter(flat: Tensor, group: Group) -> Wire:
    """Sum a flat tensor over a group, in place: what arrives is this rank's shard of it."""
    shard = _shard(flat, group)
    if group is None:
        return Wire(shard, flat, None)
    return Wire(shard, flat, start_reduce_scatter(shard, flat, group))


def _start_all_gather(flat: Tensor, group: Group) -> Wire:
    """Fill a flat tensor with every rank's shard of it, in place."""
    shard = _shard(flat, group)
    if group is None:
        return Wire(flat, shard, None)
    return Wire(flat, shard, start_all_gather(flat, shard, group))


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
