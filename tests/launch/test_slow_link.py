"""The switch between hosts, with sockets in place of TUN devices: needs no root and no network."""

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from launch.slow_link import HEADER, switch


def packet(destination: int, text: bytes = b"", version: int = 4) -> bytes:
    """Bytes laid out as a TUN device gives them, to the host whose address ends in `destination`."""
    return bytes(HEADER) + bytes([version << 4]) + bytes(18) + bytes([destination]) + text


@pytest.fixture
def hosts() -> Iterator[tuple[list[socket.socket], int]]:
    """Three hosts' ends of a running switch, and where it takes delays."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    control, delays = os.pipe()
    thread = threading.Thread(target=switch, args=([port.fileno() for port, _ in pairs], control))
    thread.start()
    for _, host in pairs:
        host.settimeout(10)
    yield [host for _, host in pairs], delays
    os.close(delays)
    thread.join(10)
    assert not thread.is_alive()  # the end of its input ends it
    os.close(control)
    for pair in pairs:
        for end in pair:
            end.close()


def test_packets_reach_their_destination_in_order(hosts) -> None:
    (first, second, third), delays = hosts
    os.write(delays, b"0\n")
    sent = [packet(3, b"one"), packet(2, b"other"), packet(3, b"two" * 20_000)]
    for bytes_ in sent:
        first.send(bytes_)
    assert [third.recv(70_000), third.recv(70_000)] == [sent[0], sent[2]]
    assert second.recv(70_000) == sent[1]
    third.send(packet(1))
    assert first.recv(70_000) == packet(1)


def test_what_has_no_destination_is_dropped(hosts) -> None:
    (first, second, _), delays = hosts
    os.write(delays, b"0\n")
    for stray in (packet(4), packet(0), packet(255), packet(2, version=6), packet(2, b"last")):
        first.send(stray)
    assert second.recv(100) == packet(2, b"last")


def test_no_packet_comes_before_its_time(hosts) -> None:
    (first, second, _), delays = hosts
    for milliseconds in (30, 60):
        os.write(delays, f"{milliseconds}\n".encode())
        time.sleep(0.1)  # until it is in force
        begin = time.monotonic()
        first.send(packet(2))
        second.recv(100)
        assert time.monotonic() - begin >= milliseconds / 1e3


def test_packets_wait_for_the_first_delay(hosts) -> None:
    (first, second, _), delays = hosts
    first.send(packet(2))
    second.settimeout(0.1)
    with pytest.raises(TimeoutError):
        second.recv(100)
    second.settimeout(10)
    os.write(delays, b"0\n")
    assert second.recv(100) == packet(2)
