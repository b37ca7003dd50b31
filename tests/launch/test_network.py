"""Hosts as network namespaces, the link between them, and torchrun jobs across it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import network, slow_link
from launch.agents import run_nodes
from launch.network import Host, Network, hosts
from parallel.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str:
    """What this machine lacks for making hosts."""
    try:
        network._check_machine(delay=True)
    except UserError as error:
        return str(error)
    return ""


able = pytest.mark.skipif(why_not() != "", reason=why_not())

SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 5000))
print("up", flush=True)
while True:
    peer = listener.accept()[0]
    while peer.recv(1 << 20):
        pass
    peer.send(b"x")
"""
CLIENT = """
import json, socket, sys, time
def connect():
    begin = time.monotonic()
    return socket.create_connection((sys.argv[1], 5000)), time.monotonic() - begin
trip = min(connect()[1] for _ in range(5))
begin = time.monotonic()
peer, _ = connect()
peer.sendall(bytes(int(sys.argv[2])))
peer.shutdown(socket.SHUT_WR)
assert peer.recv(1) == b"x"
print(json.dumps([trip * 1e3, int(sys.argv[2]) * 8e-6 / (time.monotonic() - begin)]))
"""


def measure(up: Network, rate_mbit: float) -> tuple[float, float]:
    """Round trip in ms, the best of five, and Mbit/s of 0.3 seconds' TCP between the first two hosts."""
    client, server = up.hosts[:2]
    serve = server.command([sys.executable, "-c", SERVER, server.address])
    ask = client.command([sys.executable, "-c", CLIENT, server.address, str(int(rate_mbit * 1e6 / 8 * 0.3))])
    with subprocess.Popen(serve, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        process.kill()
    assert done.returncode == 0, done.stderr
    trip, rate = json.loads(done.stdout)
    return trip, rate


def traces() -> tuple[list[str], list[int]]:
    """This process's open files and its children."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            children.append(int(stat.parent.name))
    return sorted(os.listdir("/proc/self/fd")), sorted(children)


@pytest.fixture(scope="module")
def pair() -> Iterator[Network]:
    with hosts(2, rate_mbit=200) as up:
        yield up


@able
def test_each_host_sends_at_the_stated_rate(pair: Network) -> None:
    for rate in (200, 50):
        pair.set_rate(rate)
        for _ in range(5):  # a busy machine may be slower for a while, but never faster
            _, measured = measure(pair, rate)
            assert measured <= 1.05 * rate
            if measured >= 0.6 * rate:
                break
        else:
            pytest.fail(f"only {measured:.0f} of {rate} Mbit/s")


@able
def test_a_round_trip_takes_two_delays() -> None:
    with hosts(3, rate_mbit=200, delay_ms=5) as up:
        trip, rate = measure(up, 200)
        assert trip >= 10
        assert 10 <= rate <= 1.05 * 200
        up.set_delay(20)
        assert measure(up, 10)[0] >= 40


@able
def test_what_a_host_uses_does_not_depend_on_the_machine(pair: Network) -> None:
    read = ["cat", *(f"/proc/sys/net/ipv4/{name}" for name in network.TCP)]
    seen = subprocess.run(pair.hosts[0].command(read), capture_output=True, text=True, check=True)
    assert seen.stdout.split() == list(network.TCP.values())
    ours = Path("/proc/self/ns/net").stat().st_ino
    assert len({ours, *(os.stat(host.namespace).st_ino for host in pair.hosts)}) == 3


@able
@pytest.mark.parametrize("delay_ms", [0, 1])
def test_nothing_is_left_after_an_exception(delay_ms: float) -> None:
    before = traces()
    with pytest.raises(ZeroDivisionError), hosts(2, rate_mbit=100, delay_ms=delay_ms) as up:
        sleeper = subprocess.Popen(up.hosts[1].command(["sleep", "600"]))
        while not network._processes(up.hosts):  # until it has reached its host
            time.sleep(0.01)
        raise ZeroDivisionError
    assert sleeper.wait(10) == -signal.SIGKILL
    assert traces() == before


@able
@pytest.mark.parametrize("delay_ms", [0, 1])
def test_nothing_is_left_when_a_command_fails_half_way(delay_ms: float, monkeypatch) -> None:
    before = traces()
    monkeypatch.setattr(network, "_host", lambda index, path: Host(namespace=path, address="nowhere"))
    with pytest.raises(
        UserError, match=r"`ip address add nowhere/24 dev eth0` failed with `.+`: use another"
    ):
        hosts(2, rate_mbit=100, delay_ms=delay_ms).__enter__()
    assert traces() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ((network.sys, "platform", "darwin"), "only Linux has, but this is darwin: use Linux"),
        ((network.os, "geteuid", lambda: 7), "only root may make, but this is user 7: run as root"),
        ((network.shutil, "which", lambda tool: None), "with `ip`, but .* `apt-get install iproute2`"),
        ((slow_link, "DEVICE", "/dev/none"), "a delay needs /dev/none, but it is missing: run `modprobe"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(change, sentence: str, monkeypatch) -> None:
    if change[0] is slow_link:
        monkeypatch.setattr(network.os, "geteuid", lambda: 0)
        monkeypatch.setattr(network.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(*change)
    with pytest.raises(UserError, match=sentence):
        hosts(2, rate_mbit=100, delay_ms=1).__enter__()


@pytest.mark.parametrize(("rate", "delay"), [(0, 0), (20_000, 0), (float("nan"), 0), (100, -1), (100, 500)])
def test_rate_and_delay_have_limits(rate: float, delay: float) -> None:
    with pytest.raises(UserError, match=r"`(rate_mbit|delay_ms)` must lie between .* but is .*: "):
        hosts(2, rate, delay).__enter__()


@able
def test_what_the_system_refuses_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(network, "CLONE_NEWNET", -1)
    with pytest.raises(UserError, match=r"only root may make, but the system says `.*unshare.*`: run as"):
        hosts(2, rate_mbit=100).__enter__()


ALL_REDUCE = """
import json, os, pathlib, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
number = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(number)
seen = number.item(), os.stat("/proc/self/ns/net").st_ino, os.environ["OMP_NUM_THREADS"]
pathlib.Path(os.environ["FOLDER"], os.environ["RANK"]).write_text(json.dumps(seen))
dist.destroy_process_group()
"""


@able
def test_a_torchrun_job_adds_across_hosts(pair: Network, tmp_path: Path) -> None:
    nodes = pair.hosts[::-1]
    assert run_nodes(nodes, [sys.executable, "-c", ALL_REDUCE], 1, {"FOLDER": str(tmp_path)}) == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert seen == [[11.0, os.stat(host.namespace).st_ino, "1"] for host in nodes]


FAILS = """
import os, subprocess, sys, time
if os.environ["RANK"] == "5":
    sys.exit(f"gives up in {os.stat('/proc/self/ns/net').st_ino} at {time.monotonic()}")
subprocess.Popen(["sleep", "600"], start_new_session=True)
time.sleep(600)
"""


@able
def test_a_failing_rank_ends_all_nodes(pair: Network, capfd) -> None:
    before = traces()
    first, second = pair.hosts
    assert run_nodes([first, second, first], [sys.executable, "-c", FAILS], 2, {}) == 1
    end = time.monotonic()
    assert network._processes(pair.hosts) == [] and traces() == before
    err = capfd.readouterr().err
    said = re.search(r"^\[node 2 rank 5\] gives up in (\d+) at ([\d.]+)$", err, re.MULTILINE)
    assert said and int(said[1]) == os.stat(first.namespace).st_ino
    assert end - float(said[2]) < 60
    assert err.endswith("switchyard: node 2 ended with exit code 1\n")


PARENT = """
from launch.agents import run_nodes
from launch.network import hosts
with hosts(2, rate_mbit=100, delay_ms=1) as up:
    run_nodes(up.hosts[1:], ["sh", "-c", "echo up; exec sleep 600"], 2, {})
"""


@able
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nobody_outlives_the_process_that_started_all(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        # Whoever runs the tests in the background has them ignore SIGINT, and this process would too.
        ["env", "--default-signal=INT", sys.executable, "-c", PARENT],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # where SIGKILL leaves its folder of logs
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal would: all who do not leave its group hear a Ctrl-C
    )
    assert [process.stdout.readline(), process.stdout.readline()] == ["up\n", "up\n"]
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)  # ends when all that inherited the pipes have ended
    assert process.returncode == -number
    if number == signal.SIGINT:
        assert err.count("Traceback") == 1 and err.endswith("\nKeyboardInterrupt\n")
