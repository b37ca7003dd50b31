"""`switchyard bench layer`: one MoE layer's forward and backward, beside the floor and its peers.

Routing is forced to be even and to be skewed as Zipf's law with exponent 1, and left to a fresh router: what
is published in this field is mostly measured under forced balance. All contestants are run in turn in one
process with the same threads and torch settings; the ratio is to the floor, the bare products of the
same case. fp32 is measured with torch's own product, and with the one that training takes (parallel/cpu.py).
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from launch.bench.case import AS_ROUTED, FORCED, Case, Shape, make_case
from launch.bench.field import BASE, field
from launch.bench.output import parse
from launch.bench.peers import Contestant
from launch.bench.timing import KINDS, in_turn, median_ratio, now, shares, table
from launch.output import write_json
from moe.train.optim import DTYPES
from parallel.cpu import fast_products, keep_memory

SIZES = {"tokens": 4096, "hidden": 1024, "experts": 64, "width": 512, "top_k": 6, "shared": 2}
CHOICES = {
    "dtype": ("bf16", "fp32", "both"),
    "routing": ("both", *FORCED),
    "compiled": ("yes", "no"),
}
_onednn: Any = torch.backends.mkldnn  # whose attributes no type checker sees
DEFAULT_PRODUCT = "none"  # how torch calls its own choice of an fp32 product


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables, and write the JSON if asked."""
    options = parse("layer", arguments, CHOICES, rounds=5, threads=0, **SIZES)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_memory()
    shape = Shape(**{name: getattr(options, name) for name in SIZES})
    result = {**_settings(options, device), **vars(shape), "rows": [], "absent": {}}
    for dtype in DTYPES if options.dtype == "both" else (options.dtype,):
        for routing in (*(FORCED if options.routing == "both" else (options.routing,)), AS_ROUTED):
            for product in _products(dtype):
                with fp32_product(product):
                    case = make_case(shape, routing, DTYPES[dtype], device)
                    rows, absent = measure(case, options.rounds, compiled=options.compiled == "yes")
                _show(case, dtype, product, rows, absent)
                result["rows"] += [row | {"dtype": dtype, "fp32_product": product} for row in rows]
                result["absent"] |= absent
    write_json(options.json, result)
    return 0


def _settings(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    common = {"device": name, "dtype": options.dtype, "rounds": options.rounds}
    return common | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def _products(dtype: str) -> list[str]:
    """What makes fp32's products: torch's own, and what training takes here, where that is another."""
    if dtype != "fp32":
        return [DEFAULT_PRODUCT]
    with fast_products():
        here = _onednn.matmul.fp32_precision
    return [DEFAULT_PRODUCT] if here in (DEFAULT_PRODUCT, "ieee") else [DEFAULT_PRODUCT, here]


@contextmanager
def fp32_product(setting: str) -> Iterator[None]:
    """Products of fp32 on the CPU made as torch's setting of this name says, for all contestants alike."""
    before, _onednn.matmul.fp32_precision = _onednn.matmul.fp32_precision, setting
    try:
        yield
    finally:
        _onednn.matmul.fp32_precision = before


def measure(case: Case, rounds: int, *, compiled: bool = True) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each contestant, the floor first, and why others are absent."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with field(case, compiled=compiled) as (present, absent):
        for index, name in in_turn(list(present), rounds):
            seconds = _timed(present[name], case)
            if index > 0:
                times[name].append(seconds)
        found = {
            name: shares(partial(_timed, contestant, case), case.hidden.device)
            for name, contestant in present.items()
        }
    return [_row(case, name, times, found[name]) for name in present], absent


def _timed(contestant: Contestant, case: Case) -> tuple[float, float]:
    """Seconds of a forward and of a backward; gradients are forgotten after it, outside of both."""
    device = case.hidden.device
    begin = now(device)
    output = contestant.forward(case.hidden)
    middle = now(device)
    contestant.backward(output, case.grad)
    end = now(device)
    contestant.clear()
    case.hidden.grad = None
    return middle - begin, end - middle


def _row(
    case: Case, name: str, times: dict[str, list[tuple[float, float]]], found: dict[str, float]
) -> dict[str, Any]:
    totals = {each: [sum(pair) for pair in times[each]] for each in (name, BASE)}
    forward, backward = zip(*times[name], strict=True)
    return {
        "name": name,
        "routing": case.routing,
        "load": case.load,
        "forward_seconds": median(forward),
        "backward_seconds": median(backward),
        "total_seconds": median(totals[name]),
        "ratio_to_floor": median_ratio(totals[name], totals[BASE]),
        "shares": found,
    }


def _show(
    case: Case, dtype: str, product: str, rows: Sequence[dict[str, Any]], absent: dict[str, str]
) -> None:
    setting = "" if product == DEFAULT_PRODUCT else f", fp32 products set to {product}"
    print(f"{dtype}, {case.routing}: the busiest expert has {case.load:.2f} of the mean{setting}")
    lines = [
        {
            "ms": row["name"],
            **{part: f"{1e3 * row[f'{part}_seconds']:.1f}" for part in ("forward", "backward", "total")},
            "of floor": f"{row['ratio_to_floor']:.2f}",
            **{kind: f"{row['shares'][kind]:.0%}" for kind in KINDS},
        }
        for row in rows
    ]
    print(*table(lines), sep="\n")
    print(*(f"  {name}: {reason}" for name, reason in absent.items()), sep="\n", flush=True)
