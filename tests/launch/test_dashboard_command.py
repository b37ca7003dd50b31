"""`switchyard dashboard`, end to end: what it serves, writes, prints and refuses."""

import base64
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.dashboard import export
from launch.dashboard.command import open_runs
from launch.dashboard.view import RunView, as_json
from tests.made_run import make_run

Printed = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two runs."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "with", layers=2, steps=3, total_steps=3)
    make_run(tmp_path / "runs" / "without", layers=2, steps=2, total_steps=2, bias=False)
    return tmp_path


class Scripts(HTMLParser):
    """The content of a page's scripts; the first is the exported one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.found.append("")
        assert not any(name == "src" for name, _ in attrs), "the page must hold all that it needs"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += data


def test_an_export_holds_the_views(folder: Path, capsys: Printed) -> None:
    assert main(["dashboard", "with", "runs/without", "--export", "page.html"]) == 0
    assert capsys.readouterr().out.startswith("page.html: ")
    content = json.loads(Scripts((folder / "page.html").read_text()).found[0])
    views = json.loads(gzip.decompress(base64.b64decode(content["views"])))
    expected = [
        RunView(Path(path), name).view()
        for path, name in (("runs/with", "with"), ("runs/without", "without"))
    ]
    assert views == json.loads(as_json(expected))
    assert [view["state"] for view in views] == ["finished", "finished"]
    assert sorted(path.name for path in folder.iterdir()) == ["page.html", "runs"]


def test_no_name_ends_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands for the views, and however assets look, is put in once and stays inside."""
    monkeypatch.setattr(export, "_packed", lambda views: "</script><!-- <script> /*STYLE*/")
    scripts = Scripts(export.page([]).decode()).found
    assert len(scripts) == 2
    assert json.loads(scripts[0]) == {"views": "</script><!-- <script> /*STYLE*/"}


def test_an_export_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "page.html").write_text("before")
    monkeypatch.setattr(
        os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert main(["dashboard", "with", "--export", "page.html"]) == 2
    assert (folder / "page.html").read_text() == "before"
    assert sorted(path.name for path in folder.iterdir()) == ["page.html", "runs"]


def test_text_of_several_runs(folder: Path, capsys: Printed) -> None:
    assert main(["dashboard", "with", "without", "--text"]) == 0
    out = capsys.readouterr().out
    assert "with: finished  step 3" in out and "without: finished  step 2" in out
    assert "\x1b" not in out and out.count("load over the mean:") == 2


def test_runs_of_equal_names_are_told_apart(folder: Path) -> None:
    make_run(folder / "other" / "with", layers=1, steps=1, pairs=False)
    names = [run.name for run in open_runs(["with", "other/with", "without", "./runs/without"])]
    assert names == ["runs/with", "other/with", "without"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "a run must be named, but none is: use with, without"),
        (
            ["wiht"],
            "RUN must be a run's folder or a name under runs/, but there is no wiht: use with, without",
        ),
        (["runs"], "RUN must be a run's folder, but runs holds no metrics.jsonl: name another"),
        (
            ["with", "--export", "no/x.html"],
            "`--export` must lie in an existing folder, but no/x.html does not: ",
        ),
        (["with", "--export", "runs"], "`--export` must be a file, but runs is a folder: "),
        (["with", "--port", "70000"], "`--port` must be 0 to 65535, but is 70000: "),
        (["with", "--step", "3"], "`--step` is for `--text`, which is not given: "),
        (["with", "--layer", "3"], "`--layer` is for `--text`, which is not given: "),
        (["with", "--text", "--step", "9"], "`--step` must be a recorded one, but is 9: use 1 to 3"),
        (
            ["with", "--host", "203.0.113.7"],
            "`--host` must be an address of this machine, but 203.0.113.7 is ",
        ),
        (
            ["with", "--frobnicate"],
            "unrecognized arguments: --frobnicate: `switchyard dashboard --help` says ",
        ),
    ],
)
def test_mistakes(words: list[str], sentence: str, folder: Path, capsys: Printed) -> None:
    assert main(["dashboard", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"switchyard: {sentence}") and error.count("\n") == 1


def test_a_port_in_use(folder: Path, capsys: Printed) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["dashboard", "with", "--port", str(port)]) == 2
    assert f"`--port` must be free, but {port} is in use: " in capsys.readouterr().err


def test_it_serves_until_ctrl_c(folder: Path) -> None:
    """In a process of its own, without torch."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise AssertionError('torch is imported')")
    command = [sys.executable, "-P", "-m", "launch", "dashboard", "with", "without", "--port", "0"]
    environment = {"PYTHONPATH": f"{blocked}:{ROOT}", "PATH": "/usr/bin"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        first, second, third = (process.stdout.readline() for _ in range(3))
        url = first.split()[-1]
        port = url.rstrip("/").rsplit(":", 1)[-1]
        assert first == f"dashboard of with, without: http://127.0.0.1:{port}/\n"
        assert f"ssh -C -L {port}:127.0.0.1:{port} {socket.gethostname()}\n" in second
        assert third == "Ctrl-C ends it\n"
        listener = urllib.request.urlopen(f"{url}events", timeout=10)  # must not keep it alive
        assert listener.readline().startswith(b"data: ")
        assert urllib.request.urlopen(url, timeout=10).read() == export.page()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=10)
        listener.close()
    assert (process.returncode, out, error) == (130, "", "")
