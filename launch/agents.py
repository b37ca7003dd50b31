"""Run a command as one multi-node torchrun job, on the hosts of a network (launch/network.py).

Each node is a torchrun agent of its own on its host, and the agents find one another by static
rendezvous: they are told who is who, which takes half the time of an election, and all end with the
first that fails. The hosts share one name, so addresses are given as numbers, and gloo is told its
interface. No torch.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.network import INTERFACE, Host, end_processes

PORT = 29500  # of the first node's store: a host's ports are its own, and below those given to clients
POLL_SECONDS = 0.05


def run_nodes(
    nodes: Sequence[Host],
    command: Sequence[str],
    ranks_per_node: int,
    environment: Mapping[str, str],
) -> int:
    """Run `command` once per rank, wait, and return the exit code of the job.

    Node k, with ranks k * ranks_per_node and following, runs on `nodes[k]`; a host may stand for several
    nodes, and these hosts run nothing else meanwhile. `environment` is added to this process's own.

    0: every rank did; 1: a node failed, and one line on stderr names it. When a node fails, and when
    an exception as KeyboardInterrupt comes, all processes on these hosts are killed. What ranks write
    to stderr begins with their node and rank.
    """
    agents: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="switchyard-") as folder:
        try:
            for index in range(len(nodes)):
                words = _agent(nodes, index, command, ranks_per_node, Path(folder, str(index)))
                # In a group of its own an agent hears no Ctrl-C: what ends is decided here.
                agents.append(subprocess.Popen(words, env=_environment(environment), process_group=0))
            failed = _first_failure(agents)
        finally:
            for agent in agents:
                agent.kill()  # it may not have reached its host yet
                agent.wait()
            end_processes(nodes)
    if failed is None:
        return 0
    print(f"switchyard: node {failed} ended with exit code {agents[failed].returncode}", file=sys.stderr)
    return 1


def _agent(
    nodes: Sequence[Host], index: int, command: Sequence[str], ranks_per_node: int, logs: Path
) -> list[str]:
    torchrun = [
        *(sys.executable, "-P", "-m", "torch.distributed.run", "--no-python"),
        *("--nnodes", str(len(nodes)), "--node-rank", str(index), "--nproc-per-node", str(ranks_per_node)),
        *("--master-addr", nodes[0].address, "--master-port", str(PORT)),
        *("--local-addr", nodes[index].address),
        *("--role", f"node {index}", "--tee", "2", "--log-dir", str(logs)),
    ]
    # An agent ends its ranks when it is terminated, and it shall be when this process dies. One that dies
    # while it starts them has not noted them yet: they end with it of themselves.
    ranks = ["setpriv", "--pdeathsig", "KILL", *command]
    return nodes[index].command(["setpriv", "--pdeathsig", "TERM", *torchrun, *ranks])


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    ours = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # or every connection warns that its host name cannot be found
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${role_name} rank ${rank}] ",
    }
    return {**os.environ, **ours, **added}


def _first_failure(agents: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all agents, or the first that fails, and return its index."""
    while True:
        codes = [agent.poll() for agent in agents]
        for index, code in enumerate(codes):
            if code:
                return index
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)
