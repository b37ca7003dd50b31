"""What the measurements were taken on: card, driver and versions; and the card's peak by its data sheet."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator

import torch

from launch.bench.gpu.parts import Bench, Row

PACKAGES = ("torch", "triton", "transformer_engine", "deep_ep", "numpy", "megatron-core")

# TFLOP/s in bf16 without sparsity, as NVIDIA's data sheets give them; the first name that fits counts.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "H800 PCIe": 756.0,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
}


def peak_tflops(name: str) -> float | None:
    """The data sheet's bf16 peak of a card by the name that its driver gives; None where not known."""
    return next((peak for card, peak in PEAKS.items() if card in name), None)


def card_name(device: torch.device) -> str:
    """What the driver calls the card; on the CPU its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def versions() -> dict[str, str]:
    """Of the packages that matter, those that are installed; CUDA as torch was built for it."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each fact."""
    device = bench.device
    yield Row(name="card", values={"value": card_name(device)})
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        yield Row(name="compute capability", values={"value": capability})
        yield Row(name="memory, 10^9 bytes", values={"value": properties.total_memory / 1e9})
        yield Row(name="multiprocessors", values={"value": properties.multi_processor_count})
        yield Row(name="driver", values={"value": _driver()})
    peak = peak_tflops(card_name(device))
    yield Row(name="data sheet, bf16 TFLOP/s", values={"value": peak if peak else "not known"})
    for name, version in versions().items():
        yield Row(name=name, values={"value": version})


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(words, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "not known: nvidia-smi does not answer"
    return printed.splitlines()[0] if printed else "not known"
