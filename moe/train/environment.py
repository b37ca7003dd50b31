"""Under what a run ran: versions, machine, git state. Kept with the run as `environment.json`."""

import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from parallel.cpu import products_by
from parallel.layout import Layout

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "hydra-core", "megatron-core")


def environment(seed: int, layout: Layout) -> dict[str, Any]:
    """Facts as plain values."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "host": socket.gethostname(),
        "ranks": layout.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "cpu_fp32_products": products_by(),
        "seed": seed,
        "command": sys.argv,
        "git": _git_state(Path(__file__).resolve().parent),
    }


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return {"commit": commit, "changed_files": len(_git(folder, "status", "--porcelain").splitlines())}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout
