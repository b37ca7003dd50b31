"""Who multiplies fp32 matrices: chosen by the CPU, kept only if exact, and put back."""

from pathlib import Path

import pytest
import torch

from parallel import cpu

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"


@pytest.fixture
def cpu_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(AMD)
    monkeypatch.setattr(cpu, "CPU_INFO", path)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return path


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (AMD, True),
        (AMD.replace("avx512f", ""), False),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), False),
        (AMD.replace("fpu", "amx_bf16"), False),
    ],
)
def test_the_cpu_decides(words: str, fits: bool, cpu_info: Path) -> None:
    cpu_info.write_text(words)
    assert cpu.leaves_vectors_aside(cpu_info) == fits
    cpu_info.unlink()
    assert not cpu.leaves_vectors_aside(cpu_info)


def test_it_is_put_back(cpu_info: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "product_error", lambda: 1e-7)
    with cpu.fast_products():
        assert cpu.products_by() == "oneDNN"
    assert cpu.products_by() == "default"


def test_a_product_that_is_rounded_is_refused(cpu_info: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "product_error", lambda: 1e-5)
    with cpu.fast_products():
        assert cpu.products_by() == "default"


def test_products_inside_are_exact_on_any_machine() -> None:
    with cpu.fast_products():
        assert cpu.product_error() < cpu.EXACT


def test_the_check_sees_inputs_that_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: plain(a.bfloat16().to(a.dtype), b) if a.dtype == torch.float32 else plain(a, b),
    )
    assert cpu.product_error() > 100 * cpu.EXACT
