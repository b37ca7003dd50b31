"""Runs that are killed or interrupted, as real commands with two ranks, continue bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.small import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("tokens_per_second", "step_seconds", "memory_peak_bytes", "expert_seconds")
STEPS = 12

RECIPE = """
defaults: [base, _self_]
model: {vocab_size: 320, hidden_size: 32, num_layers: 2, intermediate_size: 64, moe_intermediate_size: 16,
        num_experts: 8, top_k: 2, num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
        v_head_dim: 8, num_mtp_layers: 1}
data: {paths: [corpus.jsonl], sequence_length: 32, validation_fraction: 0.2}
layout: {ep: 2, microbatches: 2}
train: {steps: 12, batch_size: 8, save_every: 2, eval_every: 5, eval_sequences: 8}
balance: {bias_rate: 0.01, global_aux: 0.001}
telemetry: {domains_every: 3, window: 4}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a corpus, in which run `whole` was never disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus.jsonl")
    (folder / "small.yaml").write_text(RECIPE)
    done = start(folder, "recipe=small.yaml", "run=whole").wait(timeout=120)
    assert done == 0
    return folder


def start(folder: Path, *arguments: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """`switchyard train` in a session of its own, so that a test can end all of it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", *arguments],
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def rows(folder: Path, run: str, file: str) -> list[dict[str, Any]]:
    """Whole rows of a run's file, without what depends on the clock."""
    path = folder / "runs" / run / file
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


def wait_for_step(folder: Path, run: str, step: int) -> None:
    limit = time.monotonic() + 90
    while not any(row["step"] >= step for row in rows(folder, run, "metrics.jsonl")):
        assert time.monotonic() < limit, "the run does not get there"
        time.sleep(0.01)


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process] + [each for child in children for each in descendants(int(child))]


def assert_equal_runs(folder: Path, run: str) -> None:
    for file in ("metrics.jsonl", "expert_load.jsonl"):
        expected = rows(folder, "whole", file)
        assert len([row for row in expected if "loss" in row or "counts" in row]) >= STEPS
        assert rows(folder, run, file) == expected


def test_every_step_reads_new_sequences(place: Path) -> None:
    """The cursor has moved by a batch per step, and the checkpoint holds it."""
    index = place / "runs" / "whole" / "checkpoints" / f"step-{STEPS}" / "index.json"
    state = json.loads(index.read_text())["state"]
    assert (state["step"], state["sequences"]) == (STEPS, STEPS * 8)
    steps = [row for row in rows(place, "whole", "metrics.jsonl") if "loss" in row]
    assert state["tokens"] == steps[-1]["tokens"] > 0


def kill_at(folder: Path, step: int, *arguments: str) -> None:
    """Start a run and end every process of it at once when a step is done, or within the next ones."""
    process = start(folder, *arguments)
    wait_for_step(folder, "killed", step)
    for each in descendants(process.pid):
        os.kill(each, signal.SIGKILL)
    process.wait()
    assert len([row for row in rows(folder, "killed", "metrics.jsonl") if "loss" in row]) < STEPS


def test_sigkill_loses_nothing(place: Path) -> None:
    """Killed twice off a checkpoint, and the newest one cut short: the files equal the undisturbed run's."""
    kill_at(place, 3, "recipe=small.yaml", "run=killed")
    kill_at(place, 7, "run=killed")
    checkpoints = place / "runs" / "killed" / "checkpoints"
    newest = max(checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))
    file = newest / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert start(place, "run=killed").wait(timeout=120) == 0
    assert_equal_runs(place, "killed")


def test_only_broken_checkpoints(place: Path) -> None:
    """Resuming finds nothing to resume from: one sentence, exit code 2, and the run is left as it was."""
    shutil.copytree(place / "runs" / "whole", place / "runs" / "ruined")
    for file in (place / "runs" / "ruined" / "checkpoints").glob("*/rank-00000.safetensors"):
        file.write_bytes(b"nothing")
    process = start(place, "run=ruined", "train.steps=20", stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    lines = [line for line in said.decode().splitlines() if "using an earlier one" not in line]
    assert len(lines) == 1
    assert "is broken (rank-00000.safetensors does not match its checksum)" in lines[0]
    assert rows(place, "ruined", "metrics.jsonl") == rows(place, "whole", "metrics.jsonl")


def test_interrupt_saves_and_leaves(place: Path) -> None:
    """Ctrl-C: exit code 130, a checkpoint of the very step, nothing damaged, and it goes on from there."""
    process = start(place, "recipe=small.yaml", "run=interrupted", "train.save_every=100")
    wait_for_step(place, "interrupted", 2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    done = [row["step"] for row in rows(place, "interrupted", "metrics.jsonl") if "loss" in row][-1]
    assert done < STEPS
    saved = [path.name for path in (place / "runs" / "interrupted" / "checkpoints").glob("step-*")]
    assert saved == [f"step-{done}"]
    assert start(place, "run=interrupted").wait(timeout=120) == 0
    assert_equal_runs(place, "interrupted")
