"""Products in FP8 by NVIDIA's Transformer Engine, on Hopper (H100, H200, H800): a `Backend` of fp8.py.

Its kernels quantise in the blocks that fp8.py defines, and cuBLAS multiplies: 1 x 128 with 128 x 128 for
results and their gradients, 128 x 1 with 128 x 1 for weight gradients, which are added in place. Called are
the two functions below its own GroupedLinear (version 2.20), with all experts of a stack in one call.

cuBLAS wants a multiple of 16 rows of each expert. Rows of zeros fill up, behind the expert's own: in a block
along the rows they raise no amax, a block of nothing else has scale 1, their products are cut off, and to a
gradient they add zero. How many there are follows from counts, which are on the host.
Legend: N rows, I inputs, O outputs, e experts of this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from parallel.errors import UserError

HOPPER = (9, 0)  # 8.x cannot multiply in such blocks; 10.x wants powers of two as their scales
MULTIPLE = 16  # of rows, inputs and outputs: FP8 operands of cuBLAS begin each line at 16 bytes


@dataclass(frozen=True)
class TransformerEngine:
    """As `parallel.fp8.Backend` says; `backend` makes it. I and O are multiples of 16."""

    split_quantize: Callable[..., list[Any]]
    multiply: Callable[..., Any]
    row: Any  # how to quantise along a row (1 x 128),
    column: Any  # along a column (128 x 1), held transposed,
    square: Any  # a weight (128 x 128),
    square_both: Any  # and a weight held transposed too

    def product(self, rows: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        """Rows [N, I] in 1 x 128, weights [e, O, I] in 128 x 128 -> [N, O]."""
        return self._by_expert(rows, counts, self._weights(weights, self.square), "TN", weights.shape[1])

    def product_back(self, grad: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
        """Gradients [N, O] in 1 x 128, weights [e, O, I] in 128 x 128 -> [N, I]."""
        return self._by_expert(grad, counts, self._weights(weights, self.square_both), "NN", weights.shape[2])

    def keep(self, rows: Tensor, counts: Sequence[int]) -> list[Any]:
        """What the weight gradient needs of rows [N, I]: they in 128 x 1, each expert's by themselves."""
        return self.split_quantize(fill_up(rows, counts), filled_up(counts), [self.column] * len(counts))

    def add_weight_gradient(
        self, target: Tensor, grad: Tensor, kept: list[Any], counts: Sequence[int]
    ) -> None:
        """Add grad^T rows to the target [e, O, I], gradients [N, O] in 128 x 1 as the rows that were kept."""
        assert target.is_contiguous(), "Transformer Engine writes by address"
        self._multiply(kept, self.keep(grad, counts), list(target), "NT", counts, accumulate=True)
        increment_version(target)  # which writes past torch do not; zero.py watches it

    def _weights(self, weights: Tensor, quantizer: Any) -> list[Any]:
        experts, num_outputs, num_inputs = weights.shape
        if num_outputs % MULTIPLE or num_inputs % MULTIPLE:
            raise UserError(
                f"`train.precision=fp8` needs weights whose sides on each rank are multiples of {MULTIPLE}, "
                f"but one is {num_outputs} x {num_inputs}: change the sizes in `model`, lower `layout.tp` or "
                "`layout.etp`, or set `train.precision=bf16`"
            )
        return self.split_quantize(weights.flatten(0, 1), [num_outputs] * experts, [quantizer] * experts)

    def _by_expert(
        self, rows: Tensor, counts: Sequence[int], weights: list[Any], layout: str, width: int
    ) -> Tensor:
        """Rows [N, a], each times its expert's weight -> [N, width]."""
        quantised = self.split_quantize(fill_up(rows, counts), filled_up(counts), [self.row] * len(counts))
        out = rows.new_empty(sum(filled_up(counts)), width)
        self._multiply(weights, quantised, list(out.split(filled_up(counts))), layout, counts)
        return cut_off(out, counts)

    def _multiply(
        self,
        left: list[Any],
        right: list[Any],
        out: list[Tensor],
        layout: str,
        counts: Sequence[int],
        *,
        accumulate: bool = False,
    ) -> None:
        """One product for each expert; those without rows are passed over."""
        self.multiply(
            left,
            right,
            out,
            [None] * len(out),  # results are not quantised
            out[0].dtype,
            layout=layout,
            m_splits=filled_up(counts),
            accumulate=accumulate,
            use_split_accumulator=True,  # sums of 128 products leave the short accumulator for fp32
        )


def filled_up(counts: Sequence[int]) -> list[int]:
    """How many rows each expert has with its zeros."""
    return [count + -count % MULTIPLE for count in counts]


def fill_up(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Zeros behind each expert's rows; a copy only where there are any."""
    if not any(count % MULTIPLE for count in counts):
        return rows
    zeros = rows.new_zeros(MULTIPLE - 1, rows.shape[1])
    own = zip(rows.split(list(counts)), counts, strict=True)
    return torch.cat([part for part, count in own for part in (part, zeros[: -count % MULTIPLE])])


def cut_off(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """What `fill_up` was given, of rows with zeros."""
    if not any(count % MULTIPLE for count in counts):
        return rows
    own = zip(rows.split(filled_up(counts)), counts, strict=True)
    return torch.cat([part[:count] for part, count in own])


def backend() -> TransformerEngine:
    """Transformer Engine on the current GPU. UserError where it cannot be had, with what to do."""
    if not torch.cuda.is_available():
        raise UserError(
            "Transformer Engine needs a GPU, but torch sees none here: set `train.precision=bf16`, or let "
            "FP8 be emulated"
        )
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        raise UserError(
            "`train.precision=fp8` needs a GPU that multiplies FP8 in blocks (H100, H200, H800: compute "
            f"capability 9.0), but {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}: set "
            "`train.precision=bf16`"
        )
    try:
        from transformer_engine.pytorch import Float8BlockQuantizer, is_fp8_block_scaling_available
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
        from transformer_engine_torch import DType, split_quantize
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # it asserts that its parts fit
        raise UserError(
            f"`train.precision` is fp8, but Transformer Engine cannot be imported ({error}): install it with "
            "`pip install --no-build-isolation transformer-engine[pytorch]==2.20.2` or set "
            "`train.precision=bf16`"
        ) from error
    available, reason = is_fp8_block_scaling_available(return_reason=True)
    if not available:
        raise UserError(
            f"`train.precision` is fp8, but Transformer Engine says `{reason}`: install a torch of CUDA 12.9 "
            "or later or set `train.precision=bf16`"
        )

    def quantizer(dims: int, *, rowwise: bool, columnwise: bool) -> Any:
        return Float8BlockQuantizer(
            DType.kFloat8E4M3,
            rowwise=rowwise,
            columnwise=columnwise,
            force_pow_2_scales=False,  # its default; fp8.py's scales are 448 / amax
            block_scaling_dim=dims,
        )

    return TransformerEngine(
        split_quantize=split_quantize,
        multiply=general_grouped_gemm,
        row=quantizer(1, rowwise=True, columnwise=False),
        column=quantizer(1, rowwise=False, columnwise=True),
        square=quantizer(2, rowwise=True, columnwise=False),
        square_both=quantizer(2, rowwise=True, columnwise=True),  # up to 2.18 none was made transposed alone
    )
