"""Commands other than `train` that run on ranks: started here, or by torchrun or srun before.

Started plainly, this process makes a plan once and starts the ranks, which take it over. Where the ranks are
there already, rank 0 makes it and tells the others where it lies: in `data.cache`, which all of them see.
No torch.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from launch.handover import hand_over, take_over
from launch.ranks import AS_RANK, PARTING, Meeting, Ranks, rank_command, started_ranks
from moe.config import RunConfig
from parallel.errors import UserError

DONE, WRONG_INPUT = 0, 2
CODE = "code"  # in the plan's folder: what rank 0 came to


class Plan(Protocol):
    """What a command decides before its ranks begin."""

    @property
    def config(self) -> RunConfig:
        """The settings, of which threads and cache are read here."""
        ...

    @property
    def ranks(self) -> int:
        """How many are to be started."""
        ...


P = TypeVar("P", bound=Plan)


@dataclass(frozen=True, kw_only=True)
class Together(Generic[P]):
    """A command on ranks.

    `make_plan` gets the arguments and the number of ranks that were started already; `prepare` does, once,
    what they all need. `run` is a rank's part: it gets the plan and its folder and returns the exit code, the
    same on every rank. A code of its own (1: a check failed) is no failure of a rank.
    """

    command: str
    plan: type[P]
    make_plan: Callable[[Sequence[str], int | None], P]
    prepare: Callable[[P], None]
    run: Callable[[P, Path], int]

    def main(self, arguments: Sequence[str]) -> int:
        """Run the command; the exit code: 0, one of its own, 2 the user's input, 130 interrupted."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if arguments[:1] == [AS_RANK]:
            _die_of_signals()
            return self._be_local_rank(Path(arguments[1]))
        ranks = started_ranks()
        return self._join(arguments, ranks) if ranks else self._start(arguments)

    def _start(self, arguments: Sequence[str]) -> int:
        plan = self.make_plan(arguments, None)
        self.prepare(plan)
        from launch.local import start_ranks  # imports torch

        with hand_over(plan) as folder:
            if plan.ranks == 1:  # this process will do
                _set_threads(plan)
                return self.run(plan, folder)
            code = start_ranks(plan.ranks, rank_command(self.command, folder), plan.config.launch.threads)
            return code or int((folder / CODE).read_text())

    def _join(self, arguments: Sequence[str], ranks: Ranks) -> int:
        meeting = Meeting()
        if ranks.rank > 0:
            _die_of_signals()
            decision = meeting.listen()
            return WRONG_INPUT if "error" in decision else self._be_rank(Path(decision["folder"]), meeting)
        try:
            plan = self.make_plan(arguments, ranks.world_size)
            self.prepare(plan)
        except UserError as error:
            meeting.announce({"error": str(error)})
            raise
        cache = Path(plan.config.data.cache).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        with hand_over(plan, cache) as folder:
            meeting.announce({"folder": str(folder)})
            return self._be_rank(folder, meeting)

    def _be_local_rank(self, folder: Path) -> int:
        """One of the ranks that were started here, of which a file tells the code."""
        code = self._be_rank(folder, Meeting())
        if code == WRONG_INPUT:
            return code
        (folder / CODE).write_text(str(code))
        return DONE

    def _be_rank(self, folder: Path, meeting: Meeting) -> int:
        plan = take_over(self.plan, folder)
        _set_threads(plan)
        try:
            code = self.run(plan, folder)
        except UserError as error:
            if meeting.is_first(str(error)):
                print(f"switchyard: {error}", file=sys.stderr)
            code = WRONG_INPUT
        if code != DONE:
            meeting.part(PARTING)
        return code


def _set_threads(plan: Plan) -> None:
    """As the settings say: torchrun and srun know nothing of them."""
    from torch import set_num_threads

    if plan.config.launch.threads is not None:
        set_num_threads(plan.config.launch.threads)


def _die_of_signals() -> None:
    """A rank that waits for others inside a collective would not hear of a Ctrl-C; it has nothing to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
