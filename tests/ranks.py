"""Multi-rank tests: run one function in several gloo processes that live as long as the pytest session.

`run_ranks(4, function, *args)` calls `function(rank, world_size, *args)` in four processes, each with a
fresh default process group, and returns the four results. The workers are forked from one server
that has imported torch already and are kept for the next call. A worker is never trusted after a
failure: an exception or a timeout ends all of them, and the next call starts new ones.

A function is found by the file that defines it, so any test module works, however pytest imported
it. Values travel as bytes, tensors included: nothing is shared and no file descriptor piles up.
"""

import atexit
import datetime
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

MAX_RANKS = 8
GROUP_TIMEOUT = datetime.timedelta(seconds=60)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "numpy", "pytest", "hydra"])


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message carries its traceback."""


class Call(NamedTuple):
    """One call of one rank; `args` stay pickled until the module that may define their types is loaded."""

    module: str
    file: str
    function: str
    args: bytes
    rank: int
    world_size: int
    store: str


class Pool:
    """The workers, started one by one as calls ask for more of them."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def grow(self, count: int) -> list[Connection]:
        """The pipes to the first `count` workers."""
        while len(self._workers) < count:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        return [pipe for _, pipe in self._workers[:count]]

    def discard(self) -> None:
        """End every worker, hung ones too."""
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


_pool = Pool()
atexit.register(_pool.discard)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Results by rank of `function(rank, world_size, *args)` in `world_size` (1 to 8) gloo processes.

    `function` is defined at the top level of a module. Every rank starts with torch's seed 0 and one
    thread. Raises RankFailure with the traceback of the first rank that fails, or after `timeout` seconds.
    """
    assert 1 <= world_size <= MAX_RANKS, f"1 to {MAX_RANKS} ranks, not {world_size}"
    assert "<" not in function.__qualname__, f"{function.__qualname__} is not at the top level of a module"
    file, packed = str(Path(inspect.getfile(function)).resolve()), pickle.dumps(args)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = str(Path(folder) / "store")
        try:
            pipes = _pool.grow(world_size)
            for rank, pipe in enumerate(pipes):
                call = Call(function.__module__, file, function.__qualname__, packed, rank, world_size, store)
                pipe.send_bytes(pickle.dumps(call))
            return _collect(pipes, timeout)
        except BaseException:
            _pool.discard()
            raise


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"after {timeout:g} s no answer from ranks {pending} of {len(pipes)}")
        for rank in pending:
            if pipes[rank] in ready:
                try:
                    succeeded, value = pickle.loads(pipes[rank].recv_bytes())
                except EOFError:
                    succeeded, value = False, "the process died without a traceback"
                if not succeeded:
                    raise RankFailure(f"rank {rank} of {len(pipes)} failed:\n{value}")
                results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _serve(pipe: Connection) -> None:
    """A worker: answer calls until the parent closes the pipe."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers after a Ctrl-C
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    while True:
        try:
            call = Call(*pickle.loads(pipe.recv_bytes()))
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _run(call)))
        except BaseException:
            # Sent while the group still stands, so that peers do not fail first for want of this rank.
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _run(call: Call) -> Any:
    import torch
    import torch.distributed as dist

    module = _load(call.module, call.file)
    args = pickle.loads(call.args)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{call.store}",
        rank=call.rank,
        world_size=call.world_size,
        timeout=GROUP_TIMEOUT,
    )
    torch.manual_seed(0)
    result = getattr(module, call.function)(call.rank, call.world_size, *args)
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another is still connecting
        dist.destroy_process_group()
    return result


def _load(name: str, file: str) -> ModuleType:
    """The module of a file under the name that pytest gave it, loaded once per worker."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, file
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
