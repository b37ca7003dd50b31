"""A switch of TUN devices that holds every packet for a stated time: `python slow_link.py PORT PORT ...`.

Linux can delay packets by itself (netem), but many kernels are built without that. Here a process reads
what a host sends from one TUN device and, when its time has come, writes it to another. The kernel is
told that the reader takes packets which are not yet cut into segments, nor have a checksum
(IFF_VNET_HDR), so that one read is up to 64 KiB of a TCP stream, and Python keeps up with gigabits.

There is no rate and no limit to what is held: a sender's own queue limits what comes in.

PORT: an inherited file descriptor from `open_port`; that of index n belongs to the host whose address
ends in n + 1. Standard input: a delay in milliseconds per line, each in force at once; its end ends the
switch, so that it never outlives the process that started it. No torch.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

DEVICE = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4

HEADER = 10  # bytes of struct virtio_net_hdr before every packet; it goes on to the receiver as it is
LAST_OF_DESTINATION = HEADER + 19  # the last byte of an IPv4 packet's destination
LARGEST = HEADER + 65535


def open_port(interface: str) -> int:
    """A file descriptor to a new TUN device of this name, in the calling thread's network namespace."""
    port = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH22x", interface.encode(), flags))
        fcntl.ioctl(port, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    except BaseException:
        os.close(port)
        raise
    return port


def switch(ports: Sequence[int], control: int) -> None:
    """Carry packets between `ports` until `control`, which says the delay, comes to its end."""
    held: deque[tuple[float, int, bytes]] = deque()  # due time, port, packet; one delay keeps them in order
    delay: float | None = None  # until it is known, packets wait in their devices
    while True:
        sources = [control] if delay is None else [control, *ports]
        timeout = max(0.0, held[0][0] - time.monotonic()) if held else None
        for source in select.select(sources, [], [], timeout)[0]:
            if source == control:
                lines = os.read(control, select.PIPE_BUF).split()
                if not lines:
                    return
                delay = float(lines[-1]) / 1e3
            elif delay is not None:
                packet = os.read(source, LARGEST)
                index = _destination(packet)
                if index in range(len(ports)):
                    held.append((time.monotonic() + delay, ports[index], packet))
        while held and held[0][0] <= time.monotonic():
            _, port, packet = held.popleft()
            with suppress(OSError):  # the receiver has no room or goes down: lost, as on any network
                os.write(port, packet)


def _destination(packet: bytes) -> int:
    """The index of the port that a packet is for; -1 for what is not IPv4, as a neighbour discovery."""
    return packet[LAST_OF_DESTINATION] - 1 if packet[HEADER] >> 4 == 4 else -1


if __name__ == "__main__":
    switch([int(port) for port in sys.argv[1:]], sys.stdin.fileno())
