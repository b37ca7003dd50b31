"""Hosts on one machine: network namespaces joined by a link of stated rate and delay.

    with hosts(2, rate_mbit=200, delay_ms=5) as network:
        subprocess.run(network.hosts[0].command(["ping", "-c1", network.hosts[1].address]))
        network.set_rate(100)

Every host has one interface, on which a token bucket (tc's tbf) limits what it sends. Without a delay
the interfaces are joined by a bridge; the delay is added by a process, launch/slow_link.py.

Nothing here has a name on the machine: a namespace lives as long as a file descriptor of this process,
or a process that runs inside, and a device as long as its namespace. So networks never collide, and
all of one is gone when its process is, even after SIGKILL. Linux, root. No torch.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from launch import slow_link
from parallel.errors import UserError

INTERFACE = "eth0"  # on every host, beside loopback
LIMITS = {"rate_mbit": (1, 10_000, "Mbit/s"), "delay_ms": (0, 200, "ms")}
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}  # of Debian
ROOT_ONLY = "hosts are network namespaces, which only root may make"
BE_ROOT = "run as root, and if in a container in a privileged one"
CLONE_NEWNET = 0x40000000  # linux/sched.h

# Of the hosts alone. A machine's own choices, as to probe for bandwidth (bbr), would blur what is
# measured: a sender keeps its rate after a pause, and no more in the queue than the queue has room for.
TCP = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0", "tcp_limit_output_bytes": "262144"}

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host. `namespace` is a path that `nsenter --net` takes while the network is up."""

    namespace: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs `words` on this host."""
        # `ip netns exec` would mount another /sys, which has no cgroups.
        return ["nsenter", f"--net={self.namespace}", *words]


class Network:
    """Hosts that are up. What a host sends is limited to the rate, and arrives one delay later."""

    def __init__(self, hosts: Sequence[Host], delays: IO[str] | None) -> None:
        self.hosts = tuple(hosts)
        self._delays = delays

    def set_rate(self, rate_mbit: float) -> None:
        """Limit what each host sends to `rate_mbit` Mbit/s from now on. Raises UserError out of range."""
        _check("rate_mbit", rate_mbit)
        # The bucket holds a packet of 64 KiB, and 2 ms of the rate: a timer that late costs nothing.
        burst = max(65_536, round(rate_mbit * 1e6 / 8 * 0.002))
        for host in self.hosts:
            bucket = f"tbf rate {rate_mbit * 1e6:.0f}bit burst {burst}b latency 20ms"
            _run(f"tc qdisc replace dev {INTERFACE} root {bucket}", host.namespace)

    def set_delay(self, delay_ms: float) -> None:
        """Let packets travel for `delay_ms` ms from now on, on a network that was made with a delay."""
        _check("delay_ms", delay_ms)
        assert self._delays is not None, "made without a delay"
        print(delay_ms, file=self._delays, flush=True)


@contextmanager
def hosts(count: int, rate_mbit: float, delay_ms: float = 0.0) -> Iterator[Network]:
    """`count` hosts, each sending at most `rate_mbit` Mbit/s, `delay_ms` ms apart; gone at the end.

    Whatever still runs on them then is killed. Raises UserError when a number is out of range, on a
    machine that is not Linux, and where root, a tool or a device is missing.
    """
    assert 1 <= count <= 254, count  # in 10.77.0.0/24; every network is alone with its addresses
    _check("rate_mbit", rate_mbit)
    _check("delay_ms", delay_ms)
    _check_machine(delay_ms > 0)
    with ExitStack() as stack:
        if delay_ms:
            members, delays = _joined_by_process(count, stack)
        else:
            members, delays = _joined_by_bridge(count, stack), None
        for host in members:
            _run("ip link set lo up", host.namespace)
            _run(f"ip address add {host.address}/24 dev {INTERFACE}", host.namespace)
            _run(f"ip link set {INTERFACE} up", host.namespace)
        network = Network(members, delays)
        network.set_rate(rate_mbit)
        if delay_ms:
            network.set_delay(delay_ms)
        stack.callback(end_processes, members)
        yield network


def end_processes(members: Sequence[Host]) -> None:
    """Kill every process on these hosts, and return when all are dead."""
    while pids := _processes(members):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes(members: Sequence[Host]) -> list[int]:
    namespaces = {os.stat(host.namespace).st_ino for host in members}
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if (folder / "ns" / "net").stat().st_ino in namespaces:
                pids.append(int(folder.name))
    return pids


def _joined_by_bridge(count: int, stack: ExitStack) -> list[Host]:
    switch = _in_a_thread(_new_namespace, stack)
    _run("ip link add bridge type bridge", switch)
    _run("ip link set bridge up", switch)
    members = []
    for index in range(count):
        namespace = _in_a_thread(_new_namespace, stack)
        port = f"port{index}"
        _run(f"ip link add {port} type veth peer name {INTERFACE} netns {namespace}", switch)
        _run(f"ip link set {port} master bridge up", switch)
        members.append(_host(index, namespace))
    return members


def _joined_by_process(count: int, stack: ExitStack) -> tuple[list[Host], IO[str]]:
    """The hosts, and where the process takes delays."""
    members, ports = [], []
    for index in range(count):
        namespace, port = _in_a_thread(_new_namespace_with_port, stack)
        members.append(_host(index, namespace))
        ports.append(port)
        _run(f"ip link set {INTERFACE} txqueuelen 10000", namespace)  # for when the process comes late
    program = [sys.executable, "-I", slow_link.__file__, *map(str, ports)]
    # In a group of its own it hears no Ctrl-C: it ends with its input.
    link = subprocess.Popen(program, stdin=subprocess.PIPE, text=True, pass_fds=ports, process_group=0)
    assert link.stdin is not None
    stack.enter_context(link)
    return members, link.stdin


def _host(index: int, namespace: str) -> Host:
    return Host(namespace=namespace, address=f"10.77.0.{index + 1}")


def _in_a_thread(function: Callable[[ExitStack], Made], stack: ExitStack) -> Made:
    """Call it where a change of namespace concerns nobody else."""
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(function, stack).result()
        except OSError as error:
            raise UserError(f"{ROOT_ONLY}, but the system says `{error}`: {BE_ROOT}") from error


def _new_namespace(stack: ExitStack) -> str:
    """Move the calling thread to a new network namespace, which lives as long as `stack`; its path."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    for name, value in TCP.items():
        Path("/proc/sys/net/ipv4", name).write_text(value)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _new_namespace_with_port(stack: ExitStack) -> tuple[str, int]:
    namespace = _new_namespace(stack)
    port = slow_link.open_port(INTERFACE)
    stack.callback(os.close, port)
    return namespace, port


def _run(command: str, namespace: str) -> None:
    words = ["nsenter", f"--net={namespace}", *command.split()]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(
            f"the kernel must have veth, bridges and the queue tbf, but `{command}` failed with "
            f"`{' '.join(done.stderr.split())}`: use another kernel"
        )


def _check(name: str, value: float) -> None:
    least, most, unit = LIMITS[name]
    if not least <= value <= most:
        raise UserError(
            f"`{name}` must lie between {least} and {most} {unit}, but is {value:g}: choose one between"
        )


def _check_machine(delay: bool) -> None:
    if sys.platform != "linux":
        raise UserError(
            f"hosts are network namespaces, which only Linux has, but this is {sys.platform}: use Linux"
        )
    if os.geteuid() != 0:
        raise UserError(f"{ROOT_ONLY}, but this is user {os.geteuid()}: {BE_ROOT}")
    for tool, package in PACKAGES.items():
        if shutil.which(tool) is None:
            raise UserError(
                f"hosts are made with `{tool}`, but it is not installed: run `apt-get install {package}`"
            )
    if delay and not os.path.exists(slow_link.DEVICE):
        raise UserError(
            f"a delay needs {slow_link.DEVICE}, but it is missing: run `modprobe tun`, or start the "
            f"container with `--device {slow_link.DEVICE}`"
        )
