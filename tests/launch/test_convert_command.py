"""`convert` as a command: several processes, one that fails and is continued, and what a mistake says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.moe.hf.shards import damage, lite_folder, shard
from tests.moe.hf.test_convert import files_of, same_bits

ROOT = Path(__file__).resolve().parents[2]


def convert(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch", "convert", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """Files whose entry is there, by what tells whether they were written again."""
    found = {}
    for entry in partial.glob("entries/*.json"):
        path = partial / "new" / entry.name.removesuffix(".json").replace("--", "/")
        found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def test_two_processes_that_fail_and_are_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second process meets a corrupt shard; one process finishes; two write it back."""
    released, ours, back = lite_folder(tmp_path / "released"), tmp_path / "ours", tmp_path / "back"
    whole = shard(released, 4).read_bytes()
    damage(shard(released, 4))
    done = convert("from-hf", released, ours, "--processes", 2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("must have the checksum that SHA256SUMS gives") == 1
    assert str(shard(released, 4)) in done.stderr and "Traceback" not in done.stderr
    before = finished(tmp_path / ".ours.partial")
    assert shard(released, 2).name in before and not ours.exists()
    shard(released, 4).write_bytes(whole)
    assert main(["convert", "from-hf", str(released), str(ours)]) == 0
    shown = capsys.readouterr()
    assert f"wrote {ours}" in shown.out and "(100%)" in shown.err
    written = {path.name: path.stat() for path in (ours / "checkpoints" / "step-0").iterdir()}
    assert {name: (written[name].st_ino, written[name].st_mtime_ns) for name in before} == before
    done = convert("to-hf", ours, back, "--shard-gb", 30e-6, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert len(list(back.glob("*.safetensors"))) > 3
    assert same_bits(files_of(back), files_of(released))
    check = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=back)
    assert check.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "released"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["from-hf", "nowhere", "out"], "weights must come from a Hugging Face folder"),
        (["from-hf", "nowhere"], "the following arguments are required: target"),
        (["to-hf", "a", "b", "--processes", "0"], "`--processes` must be greater than 0, but is 0"),
        (["to-hf", "a", "b", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["elsewhere", "a", "b"], "there is no command `convert elsewhere`"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
