"""Who takes part in `bench layer`: the floors, ours, and every peer that can run the case here."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from launch.bench.case import Case
from launch.bench.floor import Floor
from launch.bench.peers import Contestant, Ours, plain_loop, transformers

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm", "deepgemm", "sonicmoe")  # of transformers' experts
BASE = "floor"


@contextmanager
def field(case: Case, *, compiled: bool = True) -> Iterator[tuple[dict[str, Contestant], dict[str, str]]]:
    """Contestants by name, each of which has run the case once, and why others are absent.

    `compiled`: ours takes part once more, with what torch's compiler makes of it.
    """
    present: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for own in (Floor(case), Floor(case, at_once=True), Ours(case), Ours(case, buffers=True)):
        present[own.name] = own
    present["plain loop"] = plain_loop(case)
    with ExitStack() as around:
        makers = {"ours, compiled": partial(Ours, compiled=True)} if compiled else {}
        for name, make in (makers | _peers(around)).items():
            try:
                peer = make(case)
                peer.backward(peer.forward(case.hidden), case.grad)
                peer.clear()
                present[name] = peer
            except Exception as error:  # whatever stops a peer must not stop the others
                absent[name] = _reason(error)
            case.hidden.grad = None
        yield present, absent


def _peers(around: ExitStack) -> dict[str, Callable[[Case], Contestant]]:
    """How each is made; what a library needs around it is entered when the first of its layers is made."""

    def megatron(case: Case, dispatcher: str) -> Contestant:
        from launch.bench import peer_megatron

        around.enter_context(peer_megatron.world())
        return peer_megatron.megatron(case, dispatcher)

    def torchtitan(case: Case) -> Contestant:
        from launch.bench import peer_torchtitan

        return peer_torchtitan.torchtitan(case)

    makers: dict[str, Callable[[Case], Contestant]] = {
        f"transformers {each}": partial(transformers, implementation=each) for each in IMPLEMENTATIONS
    }
    makers |= {
        f"Megatron-Core {each}": partial(megatron, dispatcher=each) for each in ("allgather", "alltoall")
    }
    return makers | {"torchtitan": torchtitan}


def _reason(error: Exception) -> str:
    """One line of what went wrong."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
