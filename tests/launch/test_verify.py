"""`switchyard verify`: its arguments, its table, and real runs on two ranks, sound and broken."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launch import compose, verify
from launch.cases import Case, Plan
from launch.prove import Table
from moe.config import DataConfig, LayoutConfig, RunConfig
from moe.rules import build
from moe.train.proof import Difference
from parallel.errors import UserError
from tests.small import write_corpus

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
defaults: [base, _self_]
model: {vocab_size: 320, hidden_size: 32, num_layers: 2, intermediate_size: 64, moe_intermediate_size: 16,
        num_experts: 8, top_k: 2, num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
        v_head_dim: 8, num_mtp_layers: 1}
data: {paths: [corpus.jsonl], sequence_length: 32, validation_fraction: 0.2}
layout: {ep: 2, microbatches: 2}
train: {batch_size: 8, precision: bf16}
balance: {sequence_aux: 0.001}
"""
# In the ranks only: the gradients of experts are divided by their number, as in a well-known defect.
DEFECT = """
import os
if os.environ.get("DEFECT") and "RANK" in os.environ:
    from parallel.zero import Zero
    finish = Zero.finish_reduce
    def broken(self):
        finish(self)
        for segment in self.segments():
            if "experts." in segment.name and self._world is not None:
                segment.grad.div_(2)
    Zero.finish_reduce = broken
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and a corpus, in which the command runs."""
    write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "sitecustomize.py").write_text(DEFECT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(place: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    outer |= {"PYTHONPATH": f"{place}:{ROOT}", "TMPDIR": str(place / "temporary"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launch", "verify", "recipe=small.yaml", *arguments],
        cwd=place,
        env=outer | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(place: Path) -> list[str]:
    return [p.name for folder in ("temporary", ".cache/data") for p in (place / folder).glob(".switchyard-*")]


def test_a_layout_that_agrees(place: Path) -> None:
    process = start(place, "--json", "rows.json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert "1 layout of 2 ranks, in 1 case of 3 steps" in lines
    assert "computed in fp32, where differences show: train.precision bf16 to fp32" in lines
    assert sum(" agrees " in line for line in lines) == 2 and "FAILS" not in out
    assert lines[-1].startswith("1 of 1 layouts agree with one rank (1 of 1 cases); worst gradient ")
    written = json.loads((place / "rows.json").read_text())
    assert written["passed"]
    assert [row["step"] for row in written["rows"]] == [1, 3]
    for row in written["rows"]:
        assert (row["layout"], row["schedule"], row["recompute"]) == ("dp2·ep2", "overlap", "none")
        assert row["counts_equal"] and row["bias_equal"] and row["passed"]
        assert 0 < row["worst_gradient_diff"] < 1e-5
        assert max(row["loss_diff"], row["grad_norm_diff"]) < 1e-5
    assert left_behind(place) == []


def test_a_layout_that_does_not(place: Path) -> None:
    """Exit code 1, the tensor, its layer and its rank; the case ends there, and no rank is blamed for it."""
    process = start(place, "--json", "rows.json", DEFECT="1")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (1, "")
    named = "the gradient of layers.1.moe.experts.0.gate_up.weight (layer 1) differs, most of it on rank 0"
    assert f"  step 1: {named}" in out.splitlines()
    assert out.splitlines()[-1].startswith("0 of 1 layouts agree with one rank (0 of 1 cases); ")
    written = json.loads((place / "rows.json").read_text())
    assert not written["passed"]
    assert [(row["step"], row["passed"]) for row in written["rows"]] == [(1, False)]
    assert written["rows"][0]["worst_gradient_diff"] == pytest.approx(0.5, rel=1e-3)
    assert left_behind(place) == []


def test_ranks_that_are_there_already(place: Path) -> None:
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    processes = [start(place, RANK=str(rank), LOCAL_RANK=str(rank), DEFECT="1", **meet) for rank in (0, 1)]
    (first, first_err), (second, second_err) = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], first_err + second_err
    assert "0 of 1 layouts agree" in first and "layouts" not in second
    assert left_behind(place) == []


def test_ctrl_c_ends_all_and_leaves_nothing(place: Path) -> None:
    process = start(place, "--steps", "1000000")
    try:
        assert process.stdout is not None
        while "worst gradient" not in (line := process.stdout.readline()):  # then the ranks are at work
            assert line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert (process.returncode, err) == (130, "")
    assert left_behind(place) == []


@pytest.mark.parametrize(
    ("arguments", "world_size", "sentence"),
    [
        (["--sweep"], None, "`--sweep` takes every layout of so many ranks, but has no number: add "),
        (["--full"], None, "`--full` says how to sweep, but `--sweep` is not given: add it"),
        (["--ranks", "0"], None, "`--ranks` must be at least 1, but is 0"),
        (["--steps", "0"], None, "`--steps` must be at least 1, but is 0"),
        (["--steps", "few"], None, "argument --steps: invalid int value: 'few': `switchyard verify --help`"),
        (["--ranks", "4"], 2, "`--ranks` must be the number of ranks that were started, but is 4 and 2 were"),
        (["--json", "no/where.json"], None, "`--json` must lie in an existing folder, but no/where.json"),
        (["--swep"], None, "there is no option `--swep`"),
        (["--sweep", "--ranks", "7"], None, "recipe `small.yaml` has none of 7 ranks"),
        (["layout.ep=4"], 2, "layout.ep` must divide"),
        (["layout.tp=2", "model.capacity_factor=1.0"], None, "`model.capacity_factor` must be null"),
    ],
)
def test_mistakes(place: Path, arguments: list[str], world_size: int | None, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        verify.make_plan(["recipe=small.yaml", *arguments], world_size)
    assert sentence in str(caught.value)


def test_plans(place: Path) -> None:
    """The recipe's own layout, on as few ranks as hold it or as many as are named; or every layout."""
    alone = verify.make_plan(["recipe=small.yaml"])
    assert (alone.ranks, len(alone.cases), alone.steps, alone.json) == (2, 1, 3, None)
    assert verify.make_plan(["recipe=small.yaml", "--ranks", "4"]).cases[0].degrees.dp == 4
    assert verify.make_plan(["recipe=small.yaml"], 4).ranks == 4
    every = verify.make_plan(["recipe=small.yaml", "--sweep"], 2)
    assert every.ranks == 2 and len({case.degrees.describe() for case in every.cases}) == 10
    full = verify.make_plan(["recipe=small.yaml", "--sweep", "--full", "--ranks", "2"])
    assert len(full.cases) == 2 * len(every.cases)
    small = verify.make_plan(["recipe=small.yaml", "--shrink", "model.hidden_size=512"])
    assert small.config.model.hidden_size == 64
    assert "model.hidden_size 512 to 64" in small.notes[-1]


def test_proofs_are_in_fp32() -> None:
    given = compose.build(RunConfig, {"train": {"precision": "bf16"}})
    given = replace(given, optim=replace(given.optim, grad_reduce="bf16", moments="bf16"))
    assert verify.in_fp32(given) == RunConfig()
    bucket, whole = (RunConfig(data=DataConfig(packing=packing)) for packing in ("bucket", "whole"))
    assert verify.in_fp32(bucket) == whole


def test_a_plan_survives_its_file(place: Path) -> None:
    plan = verify.make_plan(["recipe=small.yaml", "--sweep", "--ranks", "4", "--json", "rows.json"])
    assert build(Plan, json.loads(json.dumps(asdict(plan)))) == plan


def difference(step: int, **settings: Any) -> Difference:
    values = {
        "loss_diff": 0.0,
        "auxiliary_loss_diff": 0.0,
        "grad_norm_diff": 1e-7,
        "worst_gradient_diff": 2e-6,
        "worst_gradient_name": "head",
        "counts_equal": True,
        "bias_equal": True,
        "ties": 2,
        "first_beyond": "",
        "first_beyond_rank": -1,
        "first_unequal_layer": "",
    }
    return Difference(step=step, **(values | settings))


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A layout agrees if all of its cases do; what is no number is the worst, and null for machines."""
    cases = [
        Case(layout=LayoutConfig(dp=1, tp=2, overlap=overlap), recompute="none") for overlap in (True, False)
    ]
    cases.append(Case(layout=LayoutConfig(dp=2), recompute="full"))
    file = tmp_path / "rows.json"
    table = Table(
        Plan(config=RunConfig(), cases=tuple(cases), ranks=2, steps=3, notes=("a note",), json=str(file))
    )
    beyond = {"worst_gradient_diff": float("nan"), "first_beyond": "layers.1.norm", "first_beyond_rank": 1}
    table.add(cases[0], [difference(1), difference(3, worst_gradient_diff=9e-4)], 1.5)
    table.add(cases[1], [difference(1, **beyond, counts_equal=False, first_unequal_layer="1")], 1.5)
    table.add(cases[2], [difference(1), difference(3)], 1.5)
    table.finish()
    out = capsys.readouterr().out
    assert out.startswith("2 layouts of 2 ranks, in 3 cases of 3 steps\na note\n")
    body = out.split("worst gradient\n")[1].splitlines()
    assert [line.split()[:3] for line in body[:1]] == [["tp2", "overlap", "none"]]
    assert body[1].split()[:5] == ["3", "0.0e+00", "0.0e+00", "1.0e-07", "9.0e-04"]
    assert "DIFFER" in body[2] and "FAILS" in body[2]
    assert body[3] == "  step 1: the gradient of layers.1.norm (layer 1) differs, most of it on rank 1"
    assert body[4] == "  step 1: the counts of layer 1 differ"
    assert body[-1].startswith(
        "1 of 2 layouts agree with one rank (2 of 3 cases); worst gradient difference after step 1 no number"
    )
    written = json.loads(file.read_text())
    assert not written["passed"]
    assert [row["worst_gradient_diff"] for row in written["rows"]] == [2e-6, 9e-4, None, 2e-6, 2e-6]
