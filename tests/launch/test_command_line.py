"""The table of commands, their help, and the way errors leave."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import __main__ as command_line
from launch.__main__ import COMMANDS, Command
from parallel.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_imports_nothing(name: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda module: pytest.fail(f"imported {module}"))
    assert command_line.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: switchyard {name}" in out
    assert f"example: switchyard {name} " in out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_command(words: list[str], capsys) -> None:
    assert command_line.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_group_of_commands(capsys) -> None:
    assert command_line.main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "bench balance" in out and "train" not in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "no command `trian`: did you mean `train`?"),
        (["bench", "balanse"], "no command `bench balanse`: did you mean `bench balance`?"),
        (["tset", "-k", "x"], "no command `tset`: did you mean `test`?"),
    ],
)
def test_unknown_command(words: list[str], sentence: str, capsys) -> None:
    assert command_line.main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [(UserError("mend it"), 2, "switchyard: mend it\n"), (KeyboardInterrupt(), 130, "")],
)
def test_what_leaves(raised: BaseException, code: int, printed: str, monkeypatch, capsys) -> None:
    def call(self: Command, arguments: list[str]) -> int:
        raise raised

    monkeypatch.setattr(Command, "call", call)
    assert command_line.main(["train"]) == code
    assert capsys.readouterr().err == printed


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    help_into_nothing = f"{sys.executable} -m launch train --help | true"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        help_into_nothing, shell=True, cwd=ROOT, env=buffered, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_defects_keep_their_traceback(monkeypatch) -> None:
    def call(self: Command, arguments: list[str]) -> int:
        raise ValueError("ours")

    monkeypatch.setattr(Command, "call", call)
    with pytest.raises(ValueError, match="ours"):
        command_line.main(["train"])


def test_arguments_reach_the_command(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Command, "call", lambda self, arguments: seen.append((self.target, arguments)) or 3)
    assert command_line.main(["bench", "balance", "--json", "x"]) == 3
    assert seen == [("launch.bench.balance:main", ["--json", "x"])]


@pytest.mark.parametrize("module", ["launch", "launch.train"])
def test_without_torch_and_a_traceback(module: str, tmp_path: Path) -> None:
    """Help, dry run and mistakes are told before torch is imported; nothing is written."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise AssertionError('torch is imported')")
    words = ["train"] if module == "launch" else []
    folder = tmp_path / "here"
    folder.mkdir()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [base, _self_]\n")
    for arguments, code, sentence in [
        (["--help"], 0, "example:"),
        ([f"recipe={recipe}", "--dry-run"], 0, "launch 1 x "),
        ([f"recipe={recipe}", "optim.lrr=3"], 2, "switchyard: there is no setting `optim.lrr`"),
        ([f"recipe={recipe}", "layout.ep=3"], 2, "switchyard: `layout.ep` must divide"),
        ([f"recipe={recipe}", "data.paths=[nowhere]"], 2, "switchyard: "),
    ]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *words, *arguments],
            cwd=folder,
            env={"PYTHONPATH": f"{blocked}:{ROOT}", "PATH": "/usr/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert sentence in (done.stdout if code == 0 else done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == (0 if code == 0 else 1)
        assert not (folder / "runs").exists()
