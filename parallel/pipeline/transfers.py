"""Who sends what to whom, derived from a schedule in one pass. No torch.

A *channel* is a one-way queue between two ranks for one kind of result: hidden states, which forwards
make, or gradients, which backwards make. What is sent first is received first, and nothing on one
channel ever waits for another channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from parallel.pipeline.action import Action, Kind, Schedule


@dataclass(frozen=True, order=True)
class Channel:
    """A queue of results of one kind, from rank `source` to rank `destination`."""

    source: int
    destination: int
    kind: Kind


@dataclass(frozen=True)
class Message:
    """The result of an action, and the slot in which the destination uses it."""

    result: Action
    channel: Channel
    slot: int


def messages(schedule: Schedule) -> Iterator[Message]:
    """Every result that changes ranks, each rank's in the order in which it uses them."""
    runs_on = {action: rank for rank in range(schedule.num_ranks) for action in schedule.actions(rank)}
    for rank, slots in enumerate(schedule.slots):
        for index, slot in enumerate(slots):
            for action in slot:
                source = schedule.source(action)
                if source is not None and runs_on[source] != rank:
                    yield Message(source, Channel(runs_on[source], rank, action.kind), index)


def channels(schedule: Schedule) -> list[Channel]:
    """The channels that a schedule uses, in an order that every rank agrees on."""
    return sorted({message.channel for message in messages(schedule)})


@dataclass(frozen=True)
class Transfers:
    """One rank's part: where the results of its actions go, and what to await from when on.

    `receives[i]` are put up before slot i runs: what slot i + 1 uses (and at the start slot 0), so that
    a result travels while this rank computes. Not earlier: on NCCL a receive occupies the device.
    """

    sends: dict[Action, Channel]
    receives: tuple[tuple[Message, ...], ...]


@lru_cache(maxsize=8)  # the same few schedules are walked in every step
def transfers(schedule: Schedule, rank: int) -> Transfers:
    """The sends and receives of one rank."""
    sends: dict[Action, Channel] = {}
    receives: list[list[Message]] = [[] for _ in schedule.slots[rank]]
    for message in messages(schedule):
        if message.channel.source == rank:
            sends[message.result] = message.channel
        if message.channel.destination == rank:
            receives[max(0, message.slot - 1)].append(message)
    return Transfers(sends, tuple(tuple(found) for found in receives))
