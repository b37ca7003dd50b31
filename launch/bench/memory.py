"""How much memory is free on this machine or its GPU."""

from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """What could still be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")
