"""How benchmarks time contestants side by side, and what they ask torch's profiler in one extra run.

Contestants run once per round, and each round begins with another one, so that all see the same machine;
the first round warms up. A ratio is the median of the rounds' ratios, not a ratio of medians.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler import profile

# The kinds of operations, by the names that torch gives them, without `aten::` and a trailing underscore.
_KINDS = {
    "products": "mm addmm bmm baddbmm _grouped_mm matmul linear mkldnn_linear",
    "gather": "index index_select index_add index_put _index_put_impl gather scatter scatter_add masked_fill "
    "masked_select take embedding",
    "activation": "silu silu_backward sigmoid sigmoid_backward mul div",
    "routing": "softmax _softmax _softmax_backward_data topk sort argsort bincount histc cumsum one_hot "
    "where nonzero eq ge gt",
    "sums": "add sum addcmul mean",
    "copies": "copy clone cat zero fill zeros empty resize _to_copy contiguous empty_strided empty_like "
    "zeros_like new_empty new_zeros repeat repeat_interleave",
}
_KIND_OF = {f"aten::{name}": kind for kind, names in _KINDS.items() for name in names.split()}
KINDS = (*_KINDS, "other")


def synchronise(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """A clock in seconds, once the device has nothing left to do."""
    synchronise(device)
    return time.perf_counter()


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name), in another order every round. Round 0 warms up and is not to be counted."""
    for index in range(rounds + 1):
        for place in range(len(names)):
            yield index, names[(index + place) % len(names)]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of one's seconds over another's in the same round."""
    return median(one / other for one, other in zip(seconds, base, strict=True))


def peak_flops(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """FLOP/s of the fastest of some large square products: what this machine reached in this run."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(rounds + 1):
        begin = now(device)
        torch.mm(left, right, out=out)
        seconds.append(now(device) - begin)
    return 2 * size**3 / min(seconds[1:])


def shares(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of each kind of operation in the time that operations take by themselves, in one run."""
    totals: Counter[str] = Counter()
    with _profiled(device) as profiler:
        run()
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        totals[_kind_of(event.key)] += own
    return {kind: totals[kind] / max(1e-9, totals.total()) for kind in KINDS}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory of torch's tensors in a run beyond what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _profiled(device, memory=True) as profiler:
        run()
    events = sorted(profiler.function_events, key=lambda event: event.time_range.start)
    return max(accumulate((event.self_cpu_memory_usage for event in events), initial=0))


@contextmanager
def _profiled(device: torch.device, memory: bool = False) -> Iterator[Any]:
    with profile(use_device="cuda" if device.type == "cuda" else None, profile_memory=memory) as profiler:
        yield profiler
        synchronise(device)


def _kind_of(name: str) -> str:
    return _KIND_OF.get(name.removesuffix("_"), "other")


def table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Lines of columns as wide as they must be, the first one flush left."""
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    for row in ({name: name for name in columns}, *rows):
        first, *others = columns
        yield "  " + "  ".join([row[first].ljust(widths[first]), *(row[n].rjust(widths[n]) for n in others)])
