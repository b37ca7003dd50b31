"""The script that installs, the lists in pyproject.toml, and what a wheel holds."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def test_every_package_folder_is_listed() -> None:
    folders = {path.parent for top in ("parallel", "moe", "launch") for path in (ROOT / top).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= set(PACKAGES)
    assert all((ROOT / name.replace(".", "/")).is_dir() for name in PACKAGES)


def test_requirements_are_exact() -> None:
    project = PROJECT["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["test"]
    assert all(requirement.count("==") == 1 for requirement in requirements)
    assert not any(requirement.startswith("apex") for requirement in requirements)


def test_a_wheel_holds_packages_and_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("parallel", "moe", "launch", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    (source / "recipes" / "probe.yaml").write_text("defaults: [base, _self_]\ntrain: {steps: 7}\n")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    expected = {str(p.relative_to(source)) for p in source.rglob("*") if p.suffix in (".py", ".yaml")}
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("switchyard-*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(installed)
    assert expected <= names
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch", "train", "recipe=probe", "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert "steps: 7" in done.stdout, done.stderr


class Exec(Exception):
    """What stands for the program that replaces the script."""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script in a folder of its own, with a `calls` list in place of processes."""
    loader = importlib.machinery.SourceFileLoader("switchyard_script", str(ROOT / "switchyard"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module.ROOT = tmp_path
    module.VENV = tmp_path / ".venv"
    module.PYTHON = module.VENV / "bin" / "python"
    module.UNFINISHED = module.VENV / "unfinished"
    module.calls = []
    module.fails_at = None

    def run(command: list[str], **_: object) -> SimpleNamespace:
        module.calls.append(" ".join(command[1:]))
        if module.fails_at and module.fails_at in module.calls[-1]:
            return SimpleNamespace(returncode=1, stdout="no such wheel")
        if "venv" in command:
            module.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            module.PYTHON.touch()
        return SimpleNamespace(returncode=0, stdout="")

    def execute(path: Path, arguments: list[str]) -> None:
        raise Exec(path, arguments)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run, PIPE=None, STDOUT=None))
    monkeypatch.setattr(module.os, "execv", execute)
    return module


def call(script: ModuleType, *arguments: str) -> list[str]:
    """Run the script and return the processes it started, after checking the one it became."""
    del script.calls[:]
    with pytest.raises(Exec) as became:
        script.main(list(arguments))
    assert became.value.args == (script.PYTHON, [str(script.PYTHON), "-P", "-m", "launch", *arguments])
    return list(script.calls)


def test_first_call_installs_and_second_calls_nothing(script: ModuleType, tmp_path: Path) -> None:
    venv, torch, project = call(script, "train", "--help")
    assert venv == f"-m venv {tmp_path / '.venv'}"
    assert torch.endswith(" torch==2.13.0")
    assert project.endswith(f" --editable {tmp_path}")
    assert call(script, "train") == []


def test_tests_need_their_extra_once_and_cover_the_rest(script: ModuleType, tmp_path: Path) -> None:
    assert call(script, "test")[-1].endswith(f" --editable {tmp_path}[test]")
    assert call(script, "train") == []
    assert call(script, "test") == []


def test_running_does_not_cover_tests(script: ModuleType) -> None:
    call(script, "train")
    assert call(script, "test") != []


@pytest.mark.parametrize("change", ["requirements", "place", "python"])
def test_a_change_installs_again(script: ModuleType, tmp_path: Path, change: str) -> None:
    call(script, "train")
    if change == "requirements":
        with (tmp_path / "pyproject.toml").open("a") as file:
            file.write("# another pin\n")
    elif change == "place":
        moved = tmp_path / "moved"
        moved.mkdir()
        shutil.copy(tmp_path / "pyproject.toml", moved)
        script.ROOT = moved
    else:
        script.PYTHON.unlink()
    assert len(call(script, "train")) == 3


def test_a_failed_step_shows_its_output_and_the_next_call_begins_again(script: ModuleType, capsys) -> None:
    script.fails_at = "--editable"
    with pytest.raises(SystemExit, match="failed with exit code 1"):
        script.main(["train"])
    assert "no such wheel" in capsys.readouterr().err
    half = script.VENV / "half-a-package"
    half.touch()
    script.fails_at = None
    assert len(call(script, "train")) == 3
    assert not half.exists()
    assert call(script, "train") == []


def test_an_older_python_becomes_a_newer_one(script: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(script.sys, "version_info", (3, 9))
    monkeypatch.setattr(
        script.shutil, "which", lambda name: "/opt/python3.12" if name == "python3.12" else None
    )
    with pytest.raises(Exec) as became:
        script.main(["train"])
    assert became.value.args[0] == "/opt/python3.12"
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"Python 3\.11 or newer is needed, but this is 3\.9"):
        script.main(["train"])
