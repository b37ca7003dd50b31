"""Every command and program that README and docs show runs; training at a size that takes seconds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.small import write_corpus

ROOT = Path(__file__).resolve().parent.parent
PATHS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXTS = [path.read_text() for path in PATHS]

SMALL = [
    *("model.hidden_size=32", "model.intermediate_size=32", "model.moe_intermediate_size=16"),
    *("model.num_layers=2", "model.num_heads=2", "model.kv_lora_rank=16", "data.sequence_length=32"),
    *("train.steps=2", "train.eval_sequences=8", "train.sample_tokens=2"),
]
TUNED = ["train.steps=2", "train.eval_sequences=8"]  # the model is that of the run before
CONTINUED = ["train.steps=4", "optim.begin_step=2"]


def blocks(language: str) -> list[str]:
    return [block for text in TEXTS for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[str]:
    """Every line of the shell blocks, without comments, as it stands there."""
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader would have it: notes, chats, and whatever earlier commands left."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "notes").mkdir()
    for name in ("one.txt", "two.md"):
        (folder / "notes" / name).write_text((ROOT / "README.md").read_text())
    write_corpus(folder / "chats.jsonl")
    (ROOT / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(ROOT / ".cache")  # where other tests find the same corpus
    return folder


def shrunk(command: str) -> list[str]:
    """The words of a command with what makes it small."""
    words = shlex.split(command)
    if "recipe=tiny_sft" in words or "run=tiny_sft" in words:
        return words + (CONTINUED if "run=tiny_sft" in words else TUNED)
    if "train" in words or "launch.train" in words:
        return words + SMALL
    if "select-experts" in words and "--recorded" not in words:
        return [*words, "--sequences", "2"]
    if "dashboard" in words and not {"--export", "--text"} & set(words):
        return [*words, "--export", "live.html"]  # it would serve until Ctrl-C
    if "verify" in words:
        ranks = ["--ranks", "2"] if "--sweep" in words else []
        return [*words, *ranks, "--steps", "1", *SMALL]
    if "--compare" in words and "schedule" in words:
        return [*words, "--ranks", "4", "--microbatches", "8"]
    if "bench" in words:
        few = {
            "balance": ["--steps", "2"],
            "checkpoint": ["--every", "1", "--rounds", "1"],
            "layer": [
                *("--tokens", "32", "--hidden", "32", "--experts", "8", "--width", "16", "--top-k", "2"),
                *("--rounds", "1", "--compiled", "no"),
            ],
            "model": ["--help"],  # minutes; tests/launch/test_bench_model.py trains a small model
            "gpu": ["--help"],  # tests/launch/test_bench_gpu.py runs it on the CPU
            "fp8": ["--steps", "2", "--seeds", "1"],
            "telemetry": ["--help"],  # minutes; tests/launch/test_bench_telemetry.py measures a small model
        }
        return words + few[words[words.index("bench") + 1]]
    return words


@pytest.mark.parametrize("command", commands())
def test_command(command: str, place: Path) -> None:
    if command == "./switchyard test":
        assert "./switchyard test" in (ROOT / ".ci" / "run").read_text()  # it is what runs this test
        return
    program, *words = shrunk(command)
    if program == "torchrun":
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    else:
        assert program == "./switchyard"
        done = run_command(words, place)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", blocks("python"))
def test_program(program: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 16, 64])" in done.stdout


def test_files_named_exist() -> None:
    """Tests and pictures that the README points to are there."""
    tests = [ROOT / name for text in TEXTS for name in re.findall(r"`(tests/[\w/.]+)`", text)]
    links = [
        path.parent / name
        for path, text in zip(PATHS, TEXTS, strict=True)
        for name in re.findall(r"\]\((\w[\w/.]*)\)", text)
    ]
    assert tests and links
    assert [path for path in (*tests, *links) if not path.exists()] == []
