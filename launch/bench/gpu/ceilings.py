"""What the card can do at most, measured in the same run: products, copies, grouped products.

Every other part is set against the largest bf16 product found here, which is what this card, at this
temperature and under this power limit, gives; the data sheet's peak is only quoted beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench.gpu.parts import Bench, Row
from launch.bench.gpu.shapes import EXPERT_SHAPES, TINY_SHAPES, balanced_counts

LARGEST = "largest bf16 product"
RATE, SHARE = "TFLOP/s", "share of ceiling"

# Named anew in torch 2.10; None where there is neither.
grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)


def share_of_ceiling(bench: Bench, tflops: float) -> float | None:
    """Of the largest bf16 product of this run; None where that was not measured."""
    ceiling = bench.value("ceilings", LARGEST, RATE)
    return tflops / ceiling if ceiling else None


def rows(bench: Bench) -> Iterator[Row]:
    """Products, copies, grouped products."""
    sizes = (48, 64) if bench.tiny else (4096, 6144, 8192, 16384)
    for name, dtype, precision in (
        (LARGEST, torch.bfloat16, "highest"),
        ("largest tf32 product", torch.float32, "high"),
        ("largest fp32 product", torch.float32, "highest"),
    ):
        chosen = sizes if dtype == torch.bfloat16 else sizes[:2]
        with float32_products(precision):
            rates = {size: _square(bench, size, dtype) for size in chosen}
        best = max(rates, key=lambda size: rates[size])
        note = ", ".join(f"{size}: {rate:.4g}" for size, rate in rates.items())
        yield Row(name=name, values={RATE: rates[best], "of width": best}, note=note)
    yield from _copies(bench)
    for name, experts, num_rows, num_inputs, num_outputs in _grouped_shapes(bench.tiny):
        yield _grouped(bench, name, experts, num_rows, num_inputs, num_outputs)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """ "highest": fp32 products in fp32; "high": in tf32 where the card has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _square(bench: Bench, size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2e-12 * size**3 / bench.timer.seconds(lambda: torch.mm(left, right, out=out))


def _copies(bench: Bench) -> Iterator[Row]:
    size = 2**16 if bench.tiny else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rate = 2e-9 * size / bench.timer.seconds(lambda: target.copy_(source))
    yield Row(name="copy on the device", values={"GB/s": rate}, note="read and written bytes together")
    if bench.device.type != "cuda":
        yield Row(name="host to device", note="skipped: no device apart from the host")
        return
    host = torch.zeros(size, dtype=torch.uint8).pin_memory()
    for name, to, of in (("host to device", target, host), ("device to host", host, source)):
        rate = 1e-9 * size / bench.timer.seconds(partial(to.copy_, of, non_blocking=True))
        yield Row(name=name, values={"GB/s": rate}, note="from pinned memory")


def _grouped_shapes(tiny: bool) -> Iterator[tuple[str, int, int, int, int]]:
    for shape in TINY_SHAPES if tiny else EXPERT_SHAPES:
        yield f"{shape.name}: gate and up", shape.experts, shape.rows, shape.hidden, 2 * shape.width
        yield f"{shape.name}: down", shape.experts, shape.rows, shape.width, shape.hidden


def _grouped(bench: Bench, name: str, experts: int, num_rows: int, num_inputs: int, num_outputs: int) -> Row:
    name = f"grouped_mm, {name}"
    if grouped_mm is None:
        return Row(name=name, note=f"skipped: torch {torch.__version__} has no grouped_mm")
    counts = balanced_counts(num_rows, experts)
    rows = torch.randn(num_rows, num_inputs, device=bench.device).bfloat16()
    weights = torch.randn(experts, num_outputs, num_inputs, device=bench.device).bfloat16().mT
    ends = _ends(counts, bench.device)
    product = grouped_mm
    taken = bench.timer.seconds(lambda: product(rows, weights, offs=ends))
    rate = 2e-12 * num_rows * num_inputs * num_outputs / taken
    return Row(name=name, values={RATE: rate, SHARE: share_of_ceiling(bench, rate)})


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
