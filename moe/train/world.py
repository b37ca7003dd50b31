"""The process group of all ranks and the groups of a layout, each for as long as it is needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.cpu import fast_products, keep_memory
from parallel.groups import Groups, build_groups
from parallel.layout import Layout


@contextmanager
def world(
    timeout: timedelta = timedelta(minutes=10), *, deterministic: bool = False
) -> Iterator[torch.device]:
    """Join the ranks that torch's variables name, if there are several; gives this rank's device.

    `timeout`: how long a rank waits for the others before the run ends. `deterministic`: torch takes
    kernels that give the same bits again, and raises where it has none. On a CPU products and memory are
    as parallel/cpu.py says.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    try:
        with fast_products():
            yield device
    finally:
        if deterministic:  # this call imports torch's compiler, which takes as long as torch
            torch.use_deterministic_algorithms(False)
        if several:
            dist.destroy_process_group()


@contextmanager
def groups_of(layout: Layout) -> Iterator[Groups]:
    """The groups of one of several layouts that the same ranks take in turn. Every rank must call."""
    groups = build_groups(layout)
    yield groups  # a failure ends the process, and the groups with it
    if layout.world_size > 1:
        dist.barrier()  # nobody closes a connection that another still reads from
    held = (*vars(groups).values(), *vars(groups.copies).values())
    for group in dict.fromkeys(value for value in held if isinstance(value, dist.ProcessGroup)):
        dist.destroy_process_group(group)
