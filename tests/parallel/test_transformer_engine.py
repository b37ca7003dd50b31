"""Our side of Transformer Engine against a stand-in for it, and, on an H100 or H200, against itself."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.transformer_engine import TransformerEngine, backend, cut_off, fill_up
from tests import transformer_engine_stand_in as stand_in

COUNTS = (21, 0, 16, 130, 1, 0)  # with zeros, none, without zeros, more than a block, a single row, none
WIDTH, HEIGHT = 160, 144  # no multiples of 128: the last blocks are shorter
GPU = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or importlib.util.find_spec("transformer_engine") is None,
    reason="needs an H100, H200 or H800 and Transformer Engine",
)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TransformerEngine:
    stand_in.install(monkeypatch)
    return backend()


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, gradients and weights, of magnitudes that differ by row, column and expert."""
    made = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(COUNTS), WIDTH, generator=made) * torch.logspace(-3, 3, sum(COUNTS))[:, None]
    grad = torch.randn(sum(COUNTS), HEIGHT, generator=made) * torch.logspace(2, -4, sum(COUNTS))[:, None]
    weights = torch.randn(len(COUNTS), HEIGHT, WIDTH, generator=made) * torch.logspace(-1, 1, WIDTH)
    rows, grad, weights = (each.to(device, dtype) for each in (rows, grad, weights))
    return rows, grad, weights


def rounded(numbers: Tensor, height: int, width: int) -> Tensor:
    """What is left in fp64 of a matrix in blocks of height x width: the definition, block by block."""
    out = numbers.double()
    for top in range(0, out.shape[0], height):
        for left in range(0, out.shape[1], width):
            block = numbers[top : top + height, left : left + width].float()
            scale = 448 / block.abs().max() if block.any() else torch.ones((), device=block.device)
            out[top : top + height, left : left + width] = (block * scale).to(
                torch.float8_e4m3fn
            ).double() * scale.reciprocal()
    return out


def as_given(numbers: Tensor, height: int, width: int) -> Tensor:
    return numbers.double()


Round = Callable[[Tensor, int, int], Tensor]


def defined(rows: Tensor, grad: Tensor, weights: Tensor, around: Round) -> tuple[Tensor, Tensor, Tensor]:
    """Results, gradients of rows and of weights in fp64, expert by expert, without any zeros between."""
    out, back, gradients = [], [], []
    for own, their, weight in zip(rows.split(COUNTS), grad.split(COUNTS), weights, strict=True):
        square = around(weight, 128, 128)
        out.append(around(own, 1, 128) @ square.t())
        back.append(around(their, 1, 128) @ square)
        gradients.append(around(their, 128, 1).t() @ around(own, 128, 1))
    return torch.cat(out), torch.cat(back), torch.stack(gradients)


def made(
    engine: TransformerEngine, rows: Tensor, grad: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.zeros_like(weights, dtype=torch.float32)
    kept = engine.keep(rows, COUNTS)
    out, back = engine.product(rows, COUNTS, weights), engine.product_back(grad, COUNTS, weights)
    engine.add_weight_gradient(target, grad, kept, COUNTS)
    return out, back, target


def error(ours: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours.double() - exact) / torch.linalg.vector_norm(exact))


def test_products_are_those_of_the_definition_as_if_there_were_no_zeros(engine: TransformerEngine) -> None:
    for ours, exact in zip(made(engine, *inputs()), defined(*inputs(), rounded), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert error(ours, exact) < 1e-7
        assert not torch.isnan(ours).any()


def test_each_row_and_each_column_has_a_scale_of_its_own(engine: TransformerEngine) -> None:
    """Magnitudes over six decades: one scale for a tensor would leave nothing of the smallest rows."""
    rows, _, weights = inputs()
    ours, exact = engine.product(rows, COUNTS, weights), defined(*inputs(), as_given)[0]
    assert max(error(own, one) for own, one in zip(ours, exact, strict=True)) < 6e-2


def test_results_have_the_dtype_of_the_rows(engine: TransformerEngine) -> None:
    rows, grad, weights = inputs(dtype=torch.bfloat16)
    out, back, _ = made(engine, rows, grad, weights)
    assert out.dtype == back.dtype == torch.bfloat16
    assert error(out, defined(rows, grad, weights, rounded)[0]) < 4e-3


def test_a_plain_weight_is_a_stack_of_one_and_rows_may_be_absent(engine: TransformerEngine) -> None:
    rows, _, weights = inputs()
    out = engine.product(rows[:21], (21,), weights[:1])
    assert torch.equal(out, engine.product(rows, COUNTS, weights)[:21])
    assert engine.product(rows[:0], (0, 0), weights[:2]).shape == (0, HEIGHT)
    target = torch.ones(2, HEIGHT, WIDTH)
    engine.add_weight_gradient(target, rows.new_empty(0, HEIGHT), engine.keep(rows[:0], (0, 0)), (0, 0))
    assert torch.equal(target, torch.ones(2, HEIGHT, WIDTH))


def test_weight_gradients_are_added_in_place_and_the_write_is_seen(engine: TransformerEngine) -> None:
    rows, grad, weights = inputs()
    buffer = torch.ones(7 + weights.numel())  # as zero.py holds it: a part of a flat one
    target = buffer[7:].view(weights.shape)
    before = buffer._version
    engine.add_weight_gradient(target, grad, engine.keep(rows, COUNTS), COUNTS)
    assert error(target - 1, defined(rows, grad, weights, rounded)[2]) < 1e-6
    assert torch.equal(target[1], torch.ones(HEIGHT, WIDTH)) and torch.equal(buffer[:7], torch.ones(7))
    assert buffer._version > before
    with pytest.raises(AssertionError, match="by address"):
        engine.add_weight_gradient(target.transpose(1, 2), rows, engine.keep(grad, COUNTS), COUNTS)


def test_what_is_kept_is_a_byte_for_each_number(engine: TransformerEngine) -> None:
    kept = engine.keep(torch.randn(256, WIDTH), (128, 128))
    assert all(each._rowwise_data is None and each._columnwise_data.shape == (WIDTH, 128) for each in kept)


@pytest.mark.parametrize("counts", [COUNTS, (5,), (0, 0), (15, 17, 1)])
def test_zeros_lie_behind_each_experts_rows_and_are_cut_off(counts: Sequence[int]) -> None:
    rows = torch.arange(1.0, 1 + 3 * sum(counts)).view(-1, 3)
    filled, begin = fill_up(rows, counts), 0
    for own in rows.split(list(counts)):
        size = len(own) + -len(own) % 16
        assert torch.equal(filled[begin : begin + len(own)], own)
        assert not filled[begin + len(own) : begin + size].any()
        begin += size
    assert len(filled) == begin
    assert torch.equal(cut_off(filled, counts), rows)


def test_full_segments_are_not_copied() -> None:
    rows = torch.randn(48, 4)
    assert fill_up(rows, (16, 0, 32)) is rows and cut_off(rows, (16, 0, 32)) is rows


def test_sides_that_cublas_refuses_are_a_users_mistake(engine: TransformerEngine) -> None:
    with pytest.raises(UserError, match=r"multiples of 16, but one is 24 x 160: .*`layout\.etp`"):
        engine.product(torch.randn(16, 160), (16,), torch.randn(1, 24, 160))


def test_without_a_gpu_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU, but torch sees none"):
        backend()


@pytest.mark.parametrize(
    ("name", "capability"),
    [("NVIDIA A800-SXM4-80GB", (8, 0)), ("NVIDIA L40S", (8, 9)), ("NVIDIA B200", (10, 0))],
)
def test_other_cards_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> None:
    stand_in.install(monkeypatch)
    stand_in.card(monkeypatch, capability, name)
    said = f"{name} has {capability[0]}.{capability[1]}: set `train.precision=bf16`"
    with pytest.raises(UserError, match=said):
        backend()


@pytest.mark.parametrize(
    "broken", [ImportError("no torch part"), OSError("libcublas.so.13"), RuntimeError("cudnn not found")]
)
def test_what_cannot_be_imported_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.startswith("transformer_engine"):
                raise broken

    stand_in.card(monkeypatch, (9, 0), "NVIDIA H800")
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=rf"\({broken}\): install .*transformer-engine\[pytorch\]==2\.20\.2"):
        backend()


def test_an_older_cuda_is_named_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, available=(False, "requires CUDA >= 12.9"))
    with pytest.raises(UserError, match=r"says `requires CUDA >= 12\.9`: install a torch of CUDA 12\.9"):
        backend()


@GPU
def test_the_stand_in_takes_what_the_real_one_takes() -> None:
    from transformer_engine.pytorch import Float8BlockQuantizer
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    for real, ours in (
        (general_grouped_gemm, stand_in.general_grouped_gemm),
        (Float8BlockQuantizer.__init__, stand_in.Float8BlockQuantizer.__init__),
    ):
        real_ones, our_ones = (inspect.signature(each).parameters for each in (real, ours))
        assert list(real_ones) == list(our_ones)
        assert [each.default for each in real_ones.values()] == [each.default for each in our_ones.values()]


@GPU
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
def test_transformer_engine_keeps_the_definition(dtype: torch.dtype, bound: float) -> None:
    given = inputs("cuda", dtype)
    ours = made(backend(), *given)
    for one, exact in zip(ours, defined(*given, rounded), strict=True):
        assert error(one, exact) < bound
    for one, exact in zip(ours, defined(*given, as_given), strict=True):
        assert error(one, exact) < 5e-2
