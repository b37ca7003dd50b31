"""Every CUDA path against fp64: a table of checks, each with the error it may have and why.

A new kernel is one more row. Errors are relative norms, ||found - exact|| / ||exact||, of the worst of a
check's results; where bits must be equal or choices the same, the share of those that are not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from launch.bench.gpu import check_model, check_parts, check_products
from launch.bench.gpu.exact import Found
from launch.bench.gpu.parts import Bench, Missing, Row, last_line

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Check:
    """`run` takes a device and a size, of which 1 is the least."""

    name: str
    tolerance: float
    why: str
    run: Callable[[torch.device, int], Found]


ROUNDED = "added up in fp32 and rounded to 8 bits of mantissa; cuBLAS may round partial sums too"
SINGLE = "fp32 throughout, over sums of a few hundred to a few thousand terms; tf32 would be off by 1e-3"
TWICE = "probabilities, or what is multiplied on, are rounded to bf16 too"

FOUR = "four roundings to bf16 in a row"
EXACT = "indices are integers"


def in_kernels(name: str, **given: Any) -> Callable[[torch.device, int], Found]:
    """A check of check_kernels.py, which can be imported only where Triton can."""

    def run(device: torch.device, size: int) -> Found:
        try:
            from launch.bench.gpu import check_kernels
        except ImportError as error:
            raise Missing(f"kernels need Triton ({last_line(error)})") from error
        found: Found = getattr(check_kernels, name)(device, size, **given)
        return found

    return run


CHECKS = (
    Check("linear, bf16", 4e-3, ROUNDED, partial(check_products.plain, dtype=BF16)),
    Check("linear, fp32", 1e-5, SINGLE, partial(check_products.plain, dtype=FP32)),
    Check("experts' products, bf16", 4e-3, ROUNDED, partial(check_products.grouped, dtype=BF16)),
    Check("experts' products, fp32", 1e-5, SINGLE, partial(check_products.grouped, dtype=FP32)),
    Check("torch's grouped_mm, bf16", 4e-3, ROUNDED, check_products.grouped_kernel),
    Check("attention, bf16", 1e-2, TWICE, partial(check_parts.attention, dtype=BF16, documents=False)),
    Check("attention, fp32", 2e-5, SINGLE, partial(check_parts.attention, dtype=FP32, documents=False)),
    Check(
        "attention in documents, bf16",
        1e-2,
        TWICE,
        partial(check_parts.attention, dtype=BF16, documents=True),
    ),
    Check(
        "attention merged of parts, bf16", 1e-2, TWICE, partial(check_parts.attention_in_parts, dtype=BF16)
    ),
    Check(
        "attention merged of parts, fp32", 2e-5, SINGLE, partial(check_parts.attention_in_parts, dtype=FP32)
    ),
    Check(
        "RMSNorm, bf16",
        6e-3,
        "normed and multiplied by the gain in two roundings",
        partial(check_parts.norm, dtype=BF16),
    ),
    Check("RMSNorm, fp32", 1e-5, SINGLE, partial(check_parts.norm, dtype=FP32)),
    Check("rotation, bf16", 4e-3, ROUNDED, partial(check_parts.rope, dtype=BF16)),
    Check(
        "rotation, fp32",
        1e-4,
        "angles of some hundred radians in fp32",
        partial(check_parts.rope, dtype=FP32),
    ),
    Check(
        "router, bf16",
        1e-5,
        "computed in fp32; no choice may differ but a tie",
        partial(check_parts.router, dtype=BF16),
    ),
    Check(
        "router, fp32",
        1e-5,
        "computed in fp32; no choice may differ but a tie",
        partial(check_parts.router, dtype=FP32),
    ),
    Check("cross entropy", 1e-5, SINGLE, check_parts.entropy),
    Check("head in chunks, bf16", 1e-2, TWICE, partial(check_parts.head, dtype=BF16)),
    Check("head in chunks, fp32", 1e-5, SINGLE, partial(check_parts.head, dtype=FP32)),
    Check("rows in order and back, bf16", 4e-3, ROUNDED, in_kernels("moved", dtype=BF16)),
    Check("rows in order and back, fp32", 1e-5, SINGLE, in_kernels("moved", dtype=FP32)),
    Check("SwiGLU kernels, bf16", 4e-3, ROUNDED, in_kernels("swiglu", dtype=BF16)),
    Check("SwiGLU kernels, fp32", 1e-5, SINGLE, in_kernels("swiglu", dtype=FP32)),
    Check("activation, bf16", 4e-3, ROUNDED, in_kernels("activation", dtype=BF16)),
    Check("activation, fp32", 1e-5, SINGLE, in_kernels("activation", dtype=FP32)),
    Check("choice in groups", 0.0, "of equal scores the lowest number wins", in_kernels("top_k")),
    Check("nodes of two hops", 0.0, EXACT, check_parts.nodes),
    Check("weight gradients into fp32", 1e-5, SINGLE, in_kernels("weight_gradients", buffer=FP32)),
    Check("weight gradients into bf16", 4e-3, ROUNDED, in_kernels("weight_gradients", buffer=BF16)),
    Check("experts into buffers, bf16", 2e-2, FOUR, in_kernels("experts", dtype=BF16, buffered=True)),
    Check("experts into buffers, fp32", 2e-5, SINGLE, in_kernels("experts", dtype=FP32, buffered=True)),
    Check("experts in two stacks, bf16", 2e-2, FOUR, in_kernels("experts", dtype=BF16, buffered=False)),
    Check("experts in two stacks, fp32", 2e-5, SINGLE, in_kernels("experts", dtype=FP32, buffered=False)),
    Check(
        "products in FP8", 1e-2, "a number between two of E4M3 may go to either", check_products.eight_bits
    ),
    Check("AdamW", 2e-5, "a weight is 100 times its movement and rounded to 24 bits", check_parts.adamw),
    Check(
        "MoE layer, bf16",
        2e-2,
        FOUR,
        partial(check_model.layer, dtype=BF16, routing="as routed"),
    ),
    Check("MoE layer, fp32", 2e-5, SINGLE, partial(check_model.layer, dtype=FP32, routing="as routed")),
    Check("MoE layer, fp32, skewed", 2e-5, SINGLE, partial(check_model.layer, dtype=FP32, routing="zipf")),
    Check(
        "model, fp32",
        2e-4,
        "some thirty phases in fp32, sums of thousands of terms",
        partial(check_model.model, dtype=FP32),
    ),
    Check(
        "model, bf16",
        1e-1,
        "some thirty phases, each rounded to bf16, forward and back",
        partial(check_model.model, dtype=BF16),
    ),
    Check(
        "recomputation, bf16",
        0.0,
        "the same kernels on the same bits",
        partial(check_model.recomputation, dtype=BF16),
    ),
    Check("a pair in turn, bf16", 0.0, "the order of sums is fixed", partial(check_model.pair, dtype=BF16)),
)


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each check. One that raises has failed; one that lacks something is skipped."""
    for check in CHECKS:
        yield judge(check, bench.device, 1 if bench.tiny else 16)


def judge(check: Check, device: torch.device, size: int) -> Row:
    """Run one check."""
    try:
        found = check.run(device, size)
    except Missing as missing:
        return Row(name=check.name, note=f"skipped: {missing}")
    except Exception as error:  # the others must still be heard
        return Row(name=check.name, ok=False, note=last_line(error))
    values = {"error": found.error, "allowed": check.tolerance}
    note = f"{found.note} ({check.why})" if found.note else check.why
    return Row(name=check.name, values=values, ok=found.error <= check.tolerance, note=note)
