"""Bytes written so far: a bar that ends where the files do, or lines."""

import io
import itertools
import time

from moe.telemetry.transfer import Transfer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_in_a_log() -> None:
    sizes, out = itertools.chain([10**9], itertools.repeat(3 * 10**9)), io.StringIO()
    with Transfer(4 * 10**9, lambda: next(sizes), out, log_every_s=0.01):
        time.sleep(0.05)
    lines = out.getvalue().splitlines()
    assert len(lines) > 1 and all(line.startswith("3.00 of 4.00 GB (75%)  ") for line in lines)
    rate = float(lines[0].split()[5])
    assert rate > 1  # what was there before is not counted


def test_a_bar_on_a_terminal() -> None:
    sizes, out = iter([0, 2, 7]), Terminal()
    with Transfer(5, lambda: next(sizes), out, every_s=60):
        pass
    assert "40%" in out.getvalue() and "2.00/5.00" in out.getvalue()


def test_nothing_to_write_is_all_of_it() -> None:
    out = io.StringIO()
    with Transfer(0, lambda: 100, out):
        pass
    assert out.getvalue().startswith("0.00 of 0.00 GB")
