"""DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1): microbatches enter from both ends. No torch.

Rank r holds stage r and, a second time, the stage P - 1 - r of its *mirror*: half of the microbatches
pass the ranks upwards, the other half downwards. In the middle of a step every rank has a forward of
one direction and a backward of the other to run as a pair, each of which hides the other's all-to-all.
The bubble is (P/2 - 1)(F&B + B - 3W), at P + 1 microbatches in flight on every rank.

Each rank takes eight steps. `near` is the direction that enters at its own half of the pipeline, `far`
the other one:

    1  F near                                5  B far, then F far & B near
    2  F near, F far                         6  B far, B near: W apart from the middle on
    3  B far, its W, F far                   7  a W, B near with its W apart
    4  F near & B far, F far & B near        8  the W that are left

DualPipeV (dualpipev.py) is the same eight steps on half a pipeline.
"""

from collections import deque
from collections.abc import Iterator

from parallel.pipeline.action import Action, Schedule, Slot


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe over an even number of ranks P; the microbatches are even too, and at least 2P.

    Microbatches of the first half pass the ranks upwards, of the second half downwards.
    """
    assert num_ranks % 2 == 0, f"{num_ranks} ranks have no mirrors"
    assert num_microbatches % 2 == 0 and num_microbatches >= 2 * num_ranks, f"{num_microbatches} is too few"
    half, slots = num_microbatches // 2, []
    upwards, downwards = range(half), range(half, num_microbatches)
    for rank in range(num_ranks):
        mirror = num_ranks - 1 - rank
        walk = Walk(near=(rank, upwards), far=(mirror, downwards))
        if rank > mirror:
            walk = Walk(near=(mirror, downwards), far=(rank, upwards))
        depth = min(rank, mirror)
        slots.append(tuple(walk.eight_steps(num_ranks // 2 - 1 - depth, depth + 1, half - num_ranks)))
    stages = tuple((rank, num_ranks - 1 - rank) for rank in range(num_ranks))
    return Schedule("dualpipe", num_microbatches, stages, tuple(slots))


class Walk:
    """One rank's way through its eight steps, in two directions: stage and microbatches of each."""

    def __init__(self, near: tuple[int, range], far: tuple[int, range]) -> None:
        self._stages = {"near": near[0], "far": far[0]}
        self._forward = {"near": iter(near[1]), "far": iter(far[1])}
        self._backward = {"near": iter(near[1]), "far": iter(far[1])}
        self._apart: deque[Action] = deque()  # W that wait, the oldest first

    def eight_steps(self, ahead: int, depth: int, spare: int) -> Iterator[Slot]:
        """Slots of a rank with `ahead` ranks between it and the middle and `depth` ranks up to its end.

        `spare`: by how many pairs of pairs a direction is longer than the shortest possible.
        """
        for _ in range(2 * ahead):
            yield (self._f("near"),)
        for _ in range(depth):
            yield (self._f("near"),)
            yield (self._f("far"),)
        for _ in range(ahead):
            yield (self._b_apart("far"),)
            yield (self._w(),)
            yield (self._f("far"),)
        for count in range(spare + depth):
            pair = self._f("near"), self._b("far")
            # In the middle the far B waits for this very F, by way of the mirror: no pair yet.
            yield from [(pair[0],), (pair[1],)] if count == 0 and ahead == 0 else [pair]
            yield self._f("far"), self._b("near")
        for _ in range(ahead):
            yield (self._b("far"),)
            yield self._f("far"), self._b("near")
        for count in range(2 * depth):
            direction = "near" if count % 2 else "far"
            yield (self._b(direction) if count < depth else self._b_apart(direction),)
        for _ in range(ahead):
            yield (self._w(),)
            yield (self._b_apart("near"),)
        while self._apart:
            yield (self._w(),)

    def _f(self, direction: str) -> Action:
        return Action("F", next(self._forward[direction]), self._stages[direction])

    def _b(self, direction: str) -> Action:
        return Action("B", next(self._backward[direction]), self._stages[direction])

    def _b_apart(self, direction: str) -> Action:
        action = self._b(direction)
        self._apart.append(Action("W", action.microbatch, action.stage))
        return action

    def _w(self) -> Action:
        return self._apart.popleft()
