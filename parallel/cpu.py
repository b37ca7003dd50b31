"""What makes a CPU fast: who multiplies fp32 matrices, and what becomes of memory that is freed.

Products: torch's default there is MKL, which leaves AVX-512 aside on CPUs of AMD; oneDNN uses it, and
torch gives it fp32 products once it may round their inputs to bf16. Without AMX it has no such kernel that
is faster and stays with fp32; that is checked against fp64, not assumed. The two round differently, so the
choice follows from the CPU and that check, never from a clock: every rank of a machine and every resumed
run chooses alike.

Memory: glibc gives every large tensor back to the kernel at once, and pays a page fault for each 4 KB of the
next one: a tenth of a step. `keep_memory` keeps it in the process.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CPU_INFO = Path("/proc/cpuinfo")
EXACT = 2e-6  # relative error of an fp32 product; inputs rounded to bf16 give 2e-3
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_SHAPES = ((64, 512, 64), (256, 1024, 256))


@contextmanager
def fast_products() -> Iterator[None]:
    """fp32 products by oneDNN inside, if this CPU is one where that helps and the check holds."""
    settings = _settings()
    before = settings.fp32_precision
    if leaves_vectors_aside(CPU_INFO):
        settings.fp32_precision = "bf16"
        if product_error() > EXACT:
            settings.fp32_precision = before
    try:
        yield
    finally:
        settings.fp32_precision = before


def keep_memory() -> None:
    """Have freed memory stay with this process for good, where its C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def products_by() -> str:
    """Who multiplies fp32 matrices on the CPU now: "oneDNN" or "default"."""
    return "oneDNN" if _settings().fp32_precision == "bf16" else "default"


def _settings() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def leaves_vectors_aside(cpu_info: Path) -> bool:
    """Whether torch multiplies by MKL on a CPU of AMD with AVX-512 and without AMX."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not cpu_info.is_file():
        return False
    words = set(cpu_info.read_text(encoding="utf-8").split())
    return {"AuthenticAMD", "avx512f"} <= words and not any(word.startswith("amx") for word in words)


def product_error() -> float:
    """The largest relative error of fp32 products, as torch makes them now, against fp64."""
    stream = torch.Generator().manual_seed(0)
    errors = []
    for rows, inner, columns in _SHAPES:
        left = torch.randn(rows, inner, generator=stream)
        right = torch.randn(inner, columns, generator=stream)
        exact = left.double() @ right.double()
        errors.append(((left @ right).double() - exact).norm() / exact.norm())
    return float(max(errors))
