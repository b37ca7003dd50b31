"""A stand-in for the parts of Transformer Engine 2.20 that we call, through torch, where there is no GPU.

Signatures, layouts and refusals are those of its sources (transformer_engine/pytorch: cpp_extensions/gemm.py,
tensor/float8_blockwise_tensor.py; csrc/extensions: cast.cpp, gemm.cpp; common/gemm/cublaslt_gemm.cu). It
proves that our calls have the right form and that our zeros do no harm: nothing about its kernels.
"""

import enum
import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3 = torch.float8_e4m3fn


class DType(enum.IntEnum):
    kFloat8E4M3 = 7


class Float8BlockQuantizer:
    def __init__(
        self,
        fp8_dtype: DType,
        *,
        rowwise: bool,
        columnwise: bool,
        amax_epsilon: float = 0.0,
        force_pow_2_scales: bool = True,
        block_scaling_dim: int = 2,
    ) -> None:
        assert fp8_dtype == DType.kFloat8E4M3 and amax_epsilon == 0.0 and block_scaling_dim in (1, 2)
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise
        self.force_pow_2_scales, self.block_scaling_dim = force_pow_2_scales, block_scaling_dim


@dataclass
class Storage:
    """Float8BlockwiseQTensorStorage: bytes of a matrix and of its transpose, each with 1 / scale."""

    _rowwise_data: Tensor | None = None  # [R, C]
    _rowwise_scale_inv: Tensor | None = (
        None  # in blocks of a row [C / 128, R up to 4], square [R/128, C/128 up to 4]
    )
    _columnwise_data: Tensor | None = None  # [C, R]
    _columnwise_scale_inv: Tensor | None = None  # the same of the transpose
    _is_2D_scaled: bool = False

    @property
    def device(self) -> torch.device:
        data = self._rowwise_data if self._rowwise_data is not None else self._columnwise_data
        assert data is not None
        return data.device


def split_quantize(
    tensor: Tensor,
    split_sections: list[int],
    quantizer_list: list[Float8BlockQuantizer],
    disable_bulk_allocation: bool = False,
) -> list[Storage]:
    """One kernel for each part, of its own memory alone."""
    assert len(quantizer_list) == len(split_sections)
    assert all(type(size) is int and size >= 0 for size in split_sections)
    assert sum(split_sections) <= len(tensor) and tensor.dim() == 2
    return [
        _quantize(part, quantizer)
        for part, quantizer in zip(_parts(tensor.contiguous(), split_sections), quantizer_list, strict=True)
    ]


def _parts(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(tensor[: sum(sizes)].detach().split(sizes))


def _quantize(part: Tensor, quantizer: Float8BlockQuantizer) -> Storage:
    square = quantizer.block_scaling_dim == 2
    assert quantizer.rowwise_usage or not square, "2D scaling quantizes a transpose beside its matrix"
    made = Storage(_is_2D_scaled=square)
    if quantizer.rowwise_usage:
        made._rowwise_data, made._rowwise_scale_inv = _cast(part, square, quantizer.force_pow_2_scales)
    if quantizer.columnwise_usage:
        flipped = _cast(part.t(), square, quantizer.force_pow_2_scales)
        made._columnwise_data, made._columnwise_scale_inv = flipped
    return made


def _cast(matrix: Tensor, square: bool, force_pow_2_scales: bool) -> tuple[Tensor, Tensor]:
    """Bytes [R, C] and 1 / scale in cuBLAS's layout, in blocks of 1 x 128 or 128 x 128."""
    (rows, columns), height = matrix.shape, BLOCK if square else 1
    padded = F.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.reshape(len(padded) // height, height, -(-columns // BLOCK), BLOCK)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(amax == 0, 1.0, 448 / amax)
    if force_pow_2_scales:
        scale = torch.exp2(scale.log2().floor())
    data = (blocks * scale).reshape(padded.shape)[:rows, :columns].to(E4M3).view(torch.uint8)
    inverse = scale.reciprocal()[:, 0, :, 0]
    inverse = inverse if square else inverse.t()
    return data.contiguous(), F.pad(inverse, (0, -inverse.shape[1] % 4), value=float("nan"))


def _read(data: Tensor | None, inverse: Tensor | None, square: bool) -> Tensor:
    assert data is not None and inverse is not None, "missing row-wise or column-wise usage"
    rows, columns = data.shape
    numbers = data.contiguous().view(E4M3).double()
    if square:
        assert inverse.shape == (math.ceil(rows / BLOCK), _up(math.ceil(columns / BLOCK)))
        spread = inverse.repeat_interleave(BLOCK, 0)[:rows]
    else:
        assert inverse.shape == (math.ceil(columns / BLOCK), _up(rows))
        spread = inverse.t()[:rows]
    return numbers * spread.repeat_interleave(BLOCK, 1)[:, :columns]


def _up(size: int) -> int:
    return size + -size % 4


def general_grouped_gemm(
    A: list[Any],
    B: list[Any],
    out: list[Tensor],
    quantization_params: list[Any],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    gelu: bool = False,
    grad: bool = False,
    accumulate: bool = False,
    bias: list[Tensor] | None = None,
    use_bias: bool = False,
    use_split_accumulator: bool = False,
    D_dtype: DType | None = None,
    single_output: bool = False,
) -> tuple[list[Tensor], Any, Any]:
    """out[i] (+)= B[i] A[i] in row-major order, as `layout` says which of them are transposed."""
    assert layout in ("TN", "NN", "NT") and use_split_accumulator and not (gelu or use_bias or single_output)
    assert isinstance(m_splits, list) and len(m_splits) == len(A) == len(B) == len(out)
    assert quantization_params[0] is None
    for a, b, result in zip(A, B, out, strict=True):
        if layout[0] == "T":
            left = _read(a._rowwise_data, a._rowwise_scale_inv, a._is_2D_scaled)
        else:
            left = _read(a._columnwise_data, a._columnwise_scale_inv, a._is_2D_scaled)
        if layout[1] == "T":
            right = _read(b._columnwise_data, b._columnwise_scale_inv, b._is_2D_scaled)
        else:
            right = _read(b._rowwise_data, b._rowwise_scale_inv, b._is_2D_scaled)
        (m, k), n = left.shape, len(right)
        assert right.shape[1] == k, "invalid matrix dimensions for GEMM"
        if not left.numel() or not right.numel():  # skipped before cuBLAS is asked
            if not accumulate:
                result.zero_()
            continue
        assert not (a._is_2D_scaled and b._is_2D_scaled), "2D by 2D block scaling"
        assert k % 16 == 0 and m % 8 == 0 and n % 8 == 0, "caller must pad"
        assert result.shape == (n, m) and result.is_contiguous()
        product = right @ left.t()
        result.data.copy_(result + product if accumulate else product)  # .data: torch sees no write
    return out, None, None


def install(monkeypatch: pytest.MonkeyPatch, *, available: tuple[bool, str] = (True, "")) -> None:
    """Let `import transformer_engine` find the stand-in, and torch an H100."""

    def is_fp8_block_scaling_available(return_reason: bool = False) -> Any:
        return available if return_reason else available[0]

    names = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {
            "Float8BlockQuantizer": Float8BlockQuantizer,
            "is_fp8_block_scaling_available": is_fp8_block_scaling_available,
        },
        "transformer_engine.pytorch.cpp_extensions": {"general_grouped_gemm": general_grouped_gemm},
        "transformer_engine_torch": {"DType": DType, "split_quantize": split_quantize},
    }
    for name, held in names.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    card(monkeypatch, (9, 0), "NVIDIA H100 80GB HBM3")


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    """Let torch see a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
