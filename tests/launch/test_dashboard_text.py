"""The heatmap in the terminal, as a person reads it."""

import re
from pathlib import Path

import pytest

from launch.dashboard.text import Look, draw
from launch.dashboard.view import RunView
from moe.telemetry.rows import read_rows
from parallel.errors import UserError
from tests.made_run import make_run

PLAIN = Look(width=100, colours=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    made = make_run(tmp_path_factory.mktemp("runs") / "skewed", layers=3, steps=14, bias=False)
    for number in range(5):
        made.alarm(f"alarm number {number}")
    return RunView(made.folder, "skewed")


def lines_of(run: RunView, look: Look, layer: str | None = None, step: int | None = None) -> list[str]:
    return draw(run, look, layer=layer, step=step).splitlines()


def test_every_expert_is_told_by_its_load(run: RunView) -> None:
    lines = lines_of(run, PLAIN, step=1)
    rows = {str(row["layer"]): row for row in read_rows(run.folder / "expert_load.jsonl") if row["step"] == 1}
    drawn = [re.fullmatch(r"    (\d)  (.{48})  +([\d.]+) *(\d*)", line) for line in lines]
    found = {match[1]: match for match in drawn if match}
    assert list(found) == list(rows) == ["1", "2", "3"]
    for layer, row in rows.items():
        mean = sum(row["counts"]) / 16
        bounds = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
        expected = [" .:-=#@"[sum(c / mean >= b for b in bounds)] if c else "x" for c in row["counts"]]
        assert found[layer][2] == "".join(character * 3 for character in expected)
        assert float(found[layer][3]) == pytest.approx(row["max_vio"], abs=0.005)
    assert found["1"][2].count("x") == 2 * 3 and [found[layer][4] for layer in rows] == ["2", "", ""]
    assert "expert load, step 1" in lines


def test_facts_and_the_last_alarms_stand_above(run: RunView) -> None:
    lines = lines_of(run, PLAIN)
    assert re.fullmatch(r"skewed: running  step 14  loss \d\.\d{3}  [\d,]+ tok/s  MaxVio \d\.\d\d", lines[0])
    assert lines[1] == "5 alarms, of which the last 3:"
    assert lines[2:5] == [f"! step 14: alarm number {number}" for number in (2, 3, 4)]
    assert "expert load, step 14" in lines


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("colours", [False, True])
def test_lines_fit_the_terminal(tmp_path: Path, width: int, colours: bool) -> None:
    make_run(tmp_path, layers=1, experts=64, steps=1, pairs=False)
    lines = lines_of(RunView(tmp_path, "wide"), Look(width=width, colours=colours))
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    grid = plain[plain.index("expert load, step 1") + 1 :]
    assert max(map(len, grid)) <= width
    assert any(line.startswith("a column is ") for line in grid) == (width <= 80)


def test_neighbours_are_summed_where_there_is_no_room(tmp_path: Path) -> None:
    make_run(tmp_path, layers=1, experts=64, steps=1, pairs=False)
    lines = lines_of(RunView(tmp_path, "wide"), Look(width=40, colours=False))
    (row,) = read_rows(tmp_path / "expert_load.jsonl")
    assert "a column is 4 neighbouring experts; x where one of them is dead" in " ".join(lines)
    match = next(match for line in lines if (match := re.fullmatch(r"    1  (.{16})  +[\d.]+ +2", line)))
    assert [character == "x" for character in match[1]] == [
        min(row["counts"][begin : begin + 4]) == 0 for begin in range(0, 64, 4)
    ]
    mean = sum(row["counts"]) / 64
    for begin, character in zip(range(0, 64, 4), match[1], strict=True):
        if character != "x":
            load = sum(row["counts"][begin : begin + 4]) / 4 / mean
            assert character == " .:-=#@"[sum(load >= b for b in (0.25, 0.5, 0.8, 1.25, 2.0, 4.0))]


def test_colours_go_from_blue_to_orange(run: RunView) -> None:
    text = draw(run, Look(width=100, colours=True), layer=None, step=1)
    assert text.count("\x1b[97;40mxxx\x1b[0m") == 2  # the dead
    used = set(map(int, re.findall(r"\x1b\[48;5;(\d+)m", text)))
    assert used == {25, 74, 153, 253, 222, 208, 130}  # the legend has all


def test_one_layer_over_time(run: RunView) -> None:
    lines = lines_of(run, PLAIN, layer="2", step=12)
    steps = [int(match[1]) for line in lines if (match := re.match(r" *(\d+)  [ .:\-=#@x]{48}  ", line))]
    assert steps == list(range(1, 13)) and "expert load, layer 2" in lines


def test_long_runs_are_thinned_in_one_layer(tmp_path: Path) -> None:
    make_run(tmp_path, layers=1, steps=60, pairs=False)
    lines = lines_of(RunView(tmp_path, "long"), PLAIN, layer="1")
    steps = [int(match[1]) for line in lines if (match := re.match(r" *(\d+)  [ .:\-=#@x]{48}  ", line))]
    assert len(steps) == 24 and (steps[0], steps[-1]) == (1, 60)


def test_mistakes(run: RunView) -> None:
    with pytest.raises(UserError, match="`--step` must be a recorded one, but is 15: use 1 to 14"):
        draw(run, PLAIN, layer=None, step=15)
    with pytest.raises(UserError, match="`--layer` must be one with experts, but is 0: use 1, 2, 3"):
        draw(run, PLAIN, layer="0", step=None)


def test_a_run_without_load(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert draw(RunView(tmp_path, "new"), PLAIN, layer=None, step=None).splitlines() == [
        "new: running  step 0",
        "no expert load is recorded yet",
    ]


@pytest.mark.parametrize(
    ("terminal", "variables", "colours"),
    [
        (True, {"TERM": "xterm-256color"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (False, {"TERM": "xterm-256color"}, False),
    ],
)
def test_colours_are_for_terminals(
    terminal: bool, variables: dict[str, str], colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"COLUMNS": "77", **variables}.items():
        monkeypatch.setenv(name, value)

    class Stream:
        def isatty(self) -> bool:
            return terminal

    assert Look.of(Stream()) == Look(width=77, colours=colours)  # type: ignore[arg-type]
