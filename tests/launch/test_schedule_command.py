"""`switchyard schedule`, end to end: what it prints, writes and refuses."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.image import imread

from launch.__main__ import main
from parallel.pipeline.schedules import FORMS, make

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def schedule(command: str) -> int:
    return main(["schedule", *command.split()])


def test_prints_the_table_a_sketch_and_the_numbers(folder: Path, capsys: Printed) -> None:
    assert schedule("dualpipe --ranks 2 --microbatches 4") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{make('dualpipe', 2, 4)}\n\nrank 0  FfFbb&&&bbBW\nrank 1  fFfBB&&&BBbw\n")
    assert (
        "\ndualpipe: makespan 12, bubble 0 (0.0%), peak activations 3 microbatches, weights held 2x\n" in out
    )
    assert "in microbatches on a stage: 3 3\n" in out
    assert "schedules/dualpipe-2-4.png, .svg, and .trace.json" in out
    assert sorted(path.name for path in (folder / "schedules").iterdir()) == [
        "dualpipe-2-4.png",
        "dualpipe-2-4.svg",
        "dualpipe-2-4.trace.json",
    ]


def test_pictures_and_trace_can_be_opened(folder: Path) -> None:
    assert schedule("1f1b-overlap --ranks 2 --microbatches 3 --out deep/er") == 0
    path = folder / "deep" / "er" / "1f1b-overlap-2-3"
    assert imread(path.with_suffix(".png")).ndim == 3
    assert ET.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")
    events = json.loads(path.with_suffix(".trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2 * 3 * 2
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"1f1b-overlap"}


def test_costs_are_of_a_stage(capsys: Printed) -> None:
    assert schedule("dualpipev --ranks 2 --microbatches 4 --cost f=2,b=4,w=2 --json") == 0
    twice = json.loads(capsys.readouterr().out)
    assert schedule("dualpipev --ranks 2 --microbatches 4 --json") == 0
    once = json.loads(capsys.readouterr().out)
    assert (once["costs"]["f"], twice["costs"]["f"]) == (1, 2)
    assert twice["makespan"] == 2 * once["makespan"] > 4 * 2 * 3  # four microbatches on two whole stages


def test_json_alone_is_all_that_is_printed(folder: Path, capsys: Printed) -> None:
    assert schedule("dualpipe --ranks 4 --microbatches 8 --cost a2a=0.6,p2p=0.1 --json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {key: result[key] for key in ("name", "ranks", "microbatches")} == {
        "name": "dualpipe",
        "ranks": 4,
        "microbatches": 8,
    }
    assert result["costs"] == {"f": 1, "b": 2, "w": 1, "a2a": 0.6, "p2p": 0.1}
    assert result["peak_activations"] == [5, 5, 5, 5] and result["weights_held"] == 2
    assert 2 < result["bubble"] < result["makespan"] < 40
    made = make("dualpipe", 4, 8)
    assert result["actions"] == [made.words(rank) for rank in range(4)]
    assert result["actions"][0][3] == "F4'"
    assert list(folder.iterdir()) == []


def test_json_with_pictures(folder: Path, capsys: Printed) -> None:
    assert schedule("gpipe --ranks 2 --microbatches 2 --json --out pictures") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "gpipe"
    assert (folder / "pictures" / "gpipe-2-2.png").exists()


def test_json_into_a_file(folder: Path, capsys: Printed) -> None:
    assert schedule("zb-h1 --ranks 2 --microbatches 3 --json zb.json") == 0
    assert json.loads((folder / "zb.json").read_text())["makespan"] == 10
    assert "zb-h1: makespan 10" in capsys.readouterr().out


def test_stages_per_rank(capsys: Printed) -> None:
    assert schedule("interleaved --ranks 2 --microbatches 4 --stages-per-rank 3 --json") == 0
    assert json.loads(capsys.readouterr().out)["stages"] == 6


def test_comparison_is_fair(capsys: Printed) -> None:
    """Every rank computes 8 (F + B) under every schedule; the rest is bubble."""
    assert schedule("--compare --ranks 4 --microbatches 8 --json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == list(FORMS) and result["left_out"] == {}
    for row in result["rows"]:
        assert row["makespan"] - row["bubble"] == 8 * 3
    assert [row["peak_share"] for row in result["rows"]] == [8, 4, 8, 5.5, 4, 5, 4.5]
    assert [row["costs"]["f"] for row in result["rows"]] == [1, 1, 1, 0.5, 1, 1, 0.5]


def test_comparison_in_words_and_pictures(folder: Path, capsys: Printed) -> None:
    assert schedule("dualpipev --compare --ranks 3 --microbatches 8 --cost a2a=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["schedule", "makespan", "bubble"]
    assert [line.split()[0] for line in lines[1:6]] == ["gpipe", "1f1b", "1f1b-overlap", "zb-h1", "dualpipev"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert [line for line in lines if line.startswith("left out: ")] == [
        "left out: `interleaved` needs microbatches in multiples of the pipeline ranks, but there are 8 for "
        "3 ranks: use 9",
        "left out: `dualpipe` needs an even number of pipeline ranks, but there are 3: use 4",
    ]
    picture = (folder / "schedules" / "compare-3-8.svg").read_text()
    assert picture.count('<g id="timeline-') == 5


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("dualpip --ranks 4 --microbatches 8", "there is no schedule `dualpip`: did you mean `dualpipe`?"),
        ("dualpip --compare --ranks 4 --microbatches 8", "there is no schedule `dualpip`: "),
        (
            "dualpipe --compare --ranks 3 --microbatches 8",
            "`dualpipe` needs an even number of pipeline ranks",
        ),
        ("--ranks 4 --microbatches 8", "a schedule must be named, but none is: use gpipe, 1f1b, "),
        ("gpipe --ranks 0 --microbatches 8", "`--ranks` must be at least 1, but is 0: "),
        ("gpipe --ranks 4 --microbatches 0", "`--microbatches` must be at least 1, but is 0: "),
        (
            "gpipe --ranks 4 --microbatches 8 --stages-per-rank 2",
            "`--stages-per-rank` is for `interleaved`, ",
        ),
        ("gpipe --ranks 4 --microbatches 8 --cost x=1", "`--cost` must name f, b, w, a2a, p2p as in "),
        ("gpipe --ranks 4 --microbatches 8 --json no/x.json", "`--json` must lie in an existing folder, "),
        (
            "gpipe --ranks 1 --microbatches 1 --out file",
            "`--out` must be a folder to write into, but file is ",
        ),
    ],
)
def test_mistakes(command: str, sentence: str, folder: Path, capsys: Printed) -> None:
    (folder / "file").touch()
    assert schedule(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"switchyard: {sentence}") and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "command", ["gpipe --ranks 4", "gpipe --ranks four --microbatches 8", "gpipe --rank 4"]
)
def test_arguments_that_are_none(command: str, capsys: Printed) -> None:
    assert schedule(command) == 2
    error = capsys.readouterr().err
    assert error.endswith(": `switchyard schedule --help` says how it is used\n") and error.count("\n") == 1
