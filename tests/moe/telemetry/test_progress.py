"""Plain lines without a terminal, a bar with one."""

import io

from moe.telemetry.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress, clock: Clock, first: int, last: int, seconds: float = 1.0) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        progress.update(step, 4.1234, 3912.4, 0.348)


def test_lines_come_at_every_nth_and_at_the_last_step() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(125, 30, 40, stream, clock)
    run(progress, clock, 31, 125)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 40/125  loss 4.123  3,912 tok/s  MaxVio 0.35  left 1:25",
        "step 80/125  loss 4.123  3,912 tok/s  MaxVio 0.35  left 0:45",
        "step 120/125  loss 4.123  3,912 tok/s  MaxVio 0.35  left 0:05",
        "step 125/125  loss 4.123  3,912 tok/s  MaxVio 0.35  left 0:00",
    ]


def test_time_left_follows_a_smoothed_step_time() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, 0, 1, stream, clock)
    run(progress, clock, 1, 9, seconds=10)
    clock.now += 20
    progress.update(10, 4.0, 1.0, 0.0)
    assert stream.getvalue().splitlines()[-1].endswith("left 3:01:30")  # 990 x (10 + 0.1 x (20 - 10))


def test_a_note_is_a_line_of_its_own() -> None:
    stream = io.StringIO()
    Progress(5, 0, 1, stream).note("saved step 5")
    assert stream.getvalue() == "saved step 5\n"


def test_a_terminal_gets_a_bar_and_notes_do_not_break_it() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(20, 0, 1000, stream, clock)
    run(progress, clock, 1, 10)
    progress.note("saved step 10")
    run(progress, clock, 11, 20)
    progress.close()
    assert "\rsaved step 10\n" in stream.getvalue()
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("step 20/20 |")
    assert "loss 4.123  3,912 tok/s  MaxVio 0.35  left 0:00" in last
