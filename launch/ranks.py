"""Where a process stands among the ranks that torchrun or srun started, and how they agree early.

Before training makes its process group, ranks meet at the store that torch would use anyway: under
torchrun the agent holds it, under srun rank 0 does (torch's stores on one port share one server, so
the process group finds it again).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AS_RANK = "--as-rank-of"  # the folder with the plan; how a command starts itself once per rank
PATIENCE = timedelta(hours=12)  # rank 0 may have to prepare the data first
PARTING = timedelta(seconds=5)  # how far apart ranks may come to the same end


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank and the number of ranks that were started."""

    rank: int
    world_size: int


def started_ranks() -> Ranks | None:
    """What torchrun's environment says, or srun's, which is completed for torch; None: start them here."""
    if "RANK" not in os.environ:
        os.environ.update(slurm_environment(os.environ))
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return Ranks(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))


def rank_command(command: str, folder: Path) -> list[str]:
    """How each rank of a command is started on this machine; its plan lies in `folder`."""
    # -P keeps whatever lies in the current folder from standing in for a module; a checkout that is
    # not installed is found only there.
    path = [] if Path.cwd() == ROOT else ["-P"]
    return [sys.executable, *path, "-m", "launch", *command.split(), AS_RANK, str(folder)]


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set, for one task of an `srun` step of several; else none."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # a batch script itself has no such variable
    if tasks == "1":
        return {}
    step = 1000 * int(environment["SLURM_STEP_ID"]) + int(environment["SLURM_JOB_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + step % 20000),
    }


def _first_host(nodes: str) -> str:
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


class Meeting:
    """The store at which ranks meet. Keep it alive until training ends: rank 0 may hold the server."""

    def __init__(self) -> None:
        from torch.distributed.rendezvous import rendezvous  # slow, and no part of `--dry-run`

        self._store, self._rank, self._world_size = next(iter(rendezvous("env://")))

    def announce(self, message: Mapping[str, str]) -> None:
        """Rank 0 tells all ranks what it decided, and returns when all have heard."""
        self._store.set("switchyard/decision", json.dumps(message))
        self._gather("heard", PATIENCE)

    def listen(self) -> dict[str, str]:
        """Wait for what rank 0 decided."""
        self._store.wait(["switchyard/decision"], PATIENCE)
        decision = json.loads(self._store.get("switchyard/decision"))
        self._gather("heard", PATIENCE)
        return decision

    def is_first(self, sentence: str) -> bool:
        """Whether this rank is the first to come with a sentence, so that all together print it once."""
        try:
            return self._store.add(f"switchyard/said/{sentence}", 1) == 1
        except RuntimeError:  # the server has left; better said twice than not at all
            return True

    def part(self, patience: timedelta) -> None:
        """Wait for the other ranks before leaving with a code that makes an agent end them."""
        with suppress(RuntimeError):
            self._gather("parting", patience)

    def _gather(self, occasion: str, patience: timedelta) -> None:
        keys = [f"switchyard/{occasion}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], "")
        self._store.wait(keys, patience)
