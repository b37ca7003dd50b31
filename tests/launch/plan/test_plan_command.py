"""`switchyard plan`, end to end: table, verdict, remedies that fit, exit codes, JSON, and what it refuses."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch import compose
from launch.__main__ import main
from launch.plan.estimate import ALLOWANCE, estimate
from moe.config import DataConfig, LayoutConfig, OptimConfig, RunConfig, TrainConfig
from moe.hf.places import find
from tests.moe.hf.shards import lite_folder
from tests.released import V2_LITE, V3

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def lite(tmp_path: Path) -> str:
    """A recipe of full fine-tuning of DeepSeek-V2-Lite on eight ranks."""
    shape = {
        **vars(V2_LITE),
        "rope": {"kind": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    }
    values = {
        "defaults": ["base", "_self_"],
        "model": shape,
        "data": {"sequence_length": 4096},
        "layout": {"dp": 8},
        "train": {"batch_size": 8, "precision": "bf16", "recompute": "full"},
    }
    path = tmp_path / "lite.yaml"
    path.write_text(yaml.safe_dump(values))
    return f"recipe={path}"


def test_ep1_does_not_fit_and_says_what_does(lite: str, capsys: Printed) -> None:
    assert main(["plan", lite, "cluster=a800x8"]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        said.startswith("does not fit: 1")
        and "of 80 GB on the fullest rank (rank 0); try layout.ep=4 (" in said
    )
    assert main(["plan", lite, "layout.ep=4"]) == 0


def test_ep8_fits_and_the_comparison_says_so(lite: str, capsys: Printed) -> None:
    assert main(["plan", lite, "layout.ep=8", "--compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fits: ")
    verdicts = {tuple(line.split()[:2]): line.endswith("  fits") for line in lines if " GB  " in line}
    assert verdicts["1", "full"] is False and verdicts["8", "full"] is True
    assert len(verdicts) == 8


def test_json_adds_up(lite: str, capsys: Printed, tmp_path: Path) -> None:
    assert main(["plan", "--json", lite, "layout.ep=8", "--imbalance", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    rank = result["per_rank"]
    assert (result["fits"], result["ranks"], result["memory_bytes"]) == (True, 8, 80 * 10**9)
    assert rank.pop("total_bytes") == sum(rank.values())
    assert set(rank) == {
        f"{name}_bytes" for name in ("weights", "gradients", "optimizer", "activations", "buffers")
    }
    assert rank["buffers_bytes"] > ALLOWANCE
    out = tmp_path / "plan.json"
    assert main(["plan", lite, "layout.ep=8", "--imbalance", "2", "--json", str(out)]) == 0
    uneven = json.loads(out.read_text())["per_rank"]
    assert uneven["activations_bytes"] > rank["activations_bytes"]
    assert uneven["buffers_bytes"] > rank["buffers_bytes"]
    assert uneven["weights_bytes"] == rank["weights_bytes"]


def test_the_model_is_that_of_the_weights(tmp_path: Path, capsys: Printed) -> None:
    """As `train` takes it; a recipe whose weights are elsewhere is planned as it says."""
    folder = lite_folder(tmp_path / "released")
    words = ["plan", "recipe=tiny", "data.sequence_length=64", "balance.bias=none"]
    assert main([*words, f"train.init={folder}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["per_rank"]
    config = compose.from_recipe("tiny", words[2:])
    expected = estimate(replace(config, model=find(folder).settings()[0]), 1.5).fullest
    assert found["weights_bytes"] == expected.weights_bytes
    assert main([*words, f"train.init={folder}"]) == 0
    assert f"the model is that of `train.init={folder}`\n" in capsys.readouterr().out
    assert main([*words, "train.init=elsewhere"]) == 0
    assert "the model is the recipe's: `train.init=elsewhere` is not here\n" in capsys.readouterr().out


def test_memory_is_the_clusters(lite: str) -> None:
    assert main(["plan", lite, "layout.ep=8", "cluster.memory_gb=40"]) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--imbalance", "0.5"], "`--imbalance` must be at least 1"),
        (["cluster=a80x8"], "there is no cluster `a80x8`: did you mean `a800x8`"),
        (["--bogus"], "unrecognized arguments: --bogus: `switchyard plan --help` says how it is used"),
        (["optim.engine=deepspeed"], "`plan` reckons with `optim.engine=switchyard`"),
    ],
)
def test_what_it_refuses(words: list[str], sentence: str, capsys: Printed) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_v3_on_2048_ranks_takes_seconds() -> None:
    config = RunConfig(
        model=V3,
        data=DataConfig(sequence_length=4096),
        layout=LayoutConfig(dp=128, ep=64, pp=16, schedule="dualpipe", microbatches=60),
        train=TrainConfig(batch_size=7680, precision="bf16"),
        optim=OptimConfig(moments="bf16"),
    )
    begin = time.perf_counter()
    found = estimate(config, 1.0)
    assert time.perf_counter() - begin < 20  # about one on an idle machine
    assert found.world_size == 2048 and len(found.ranks) == 16
    assert {rank.in_flight for rank in found.ranks} == {17}  # DualPipe: one more than there are ranks
