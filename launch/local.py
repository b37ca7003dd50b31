"""Start the ranks of a run on this machine, with torchrun's own agent, and see them through.

The agent offers the store at which ranks meet on a free loopback port, starts one process per rank
and stops all when one fails. Signals are ours: the first Ctrl-C or SIGTERM is passed on once, and the
ranks save and leave by themselves; a second one, or the end of the grace time, kills them.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Protocol

import torch.distributed.elastic.rendezvous.registry as registry
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 60  # for saving, after the first signal
INTERRUPTED = 130


class Failure(Protocol):
    """What is read of an agent's record of a failed rank; a negative code is the signal that ended it."""

    exitcode: int


def start_ranks(world_size: int, command: Sequence[str], threads: int | None) -> int:
    """Run `command` once per rank, wait, and return the exit code of the whole run.

    0: every rank did; 2: a rank printed what the user can mend; 130: interrupted after saving;
    1: a rank ended badly, and one line on stderr names it. `threads` per rank; None keeps the
    environment's own choice or shares the cores out.
    """
    os.environ.update(_environment(world_size, threads))
    # The agent's reports repeat at length what ranks already printed or what `_verdict` says in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    rendezvous = registry.get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"{LOOPBACK}:0",
            run_id=f"switchyard-{os.getpid()}",
            min_nodes=1,
            max_nodes=1,
            local_addr=LOOPBACK,
        )
    )
    with tempfile.TemporaryDirectory(prefix="switchyard-") as folder:
        agent = LocalElasticAgent(
            WorkerSpec(
                role="rank",
                local_world_size=world_size,
                entrypoint=command[0],
                args=tuple(command[1:]),
                rdzv_handler=rendezvous,
                max_restarts=0,
                local_addr=LOOPBACK,
            ),
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        with _Signals(agent) as signals:
            result = agent.run()
        rendezvous.shutdown()
    return _verdict(result.failures, signals.received)


def _environment(world_size: int, threads: int | None) -> dict[str, str]:
    # The agent must not replace our handlers of SIGINT, SIGTERM and SIGHUP.
    environment = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(threads or max(1, _cores() // world_size))
    if sys.platform == "linux":  # gloo would look up the host name, which need not resolve
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _verdict(failures: Mapping[int, Failure], signals_received: int) -> int:
    if not failures:  # even after a signal: it came when the last step was done
        return 0
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    # SIGTERM is how the agent ends the peers of a failed rank: it says something only when it stands alone.
    codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    gentle = {INTERRUPTED}
    if signals_received:  # before training begins a rank has nothing to save, and just ends
        gentle |= {-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}
    bad = {rank: code for rank, code in codes.items() if code not in gentle}
    if not bad:
        return INTERRUPTED
    if 2 in bad.values():
        return 2
    if signals_received > 1:
        print("switchyard: stopped at once; steps since the last checkpoint are lost", file=sys.stderr)
        return 1
    rank = min(bad, key=lambda r: (bad[r] > 0, r))  # peers of a killed rank exit with a lost connection
    how = f"exit code {bad[rank]}" if bad[rank] > 0 else signal.Signals(-bad[rank]).name
    print(f"switchyard: rank {rank} ended with {how}", file=sys.stderr)
    return 1


class _Signals:
    """Handlers for the time that the agent runs; they pass the first signal on and kill at the next."""

    def __init__(self, agent: LocalElasticAgent) -> None:
        self.received = 0
        self._agent = agent

    def __enter__(self) -> "_Signals":
        handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._stop)
        handlers[signal.SIGALRM] = self._kill
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        if not self._ranks():
            raise KeyboardInterrupt
        if self.received > 1:
            self._kill(number, frame)
            return
        for rank in self._ranks():
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        signal.alarm(GRACE_SECONDS)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        for rank in self._ranks():  # each leads a session of its own, with what it started
            with suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)

    def _ranks(self) -> list[int]:
        return [worker.id for worker in self._agent.get_worker_group().workers if worker.id]
