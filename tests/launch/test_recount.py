"""Every recorded count equals the one made, token by token, from the routing decisions that the run saved.

The run accumulates four microbatches of padded chats over two stages, two expert-parallel ranks and a
multi-token-prediction layer, and recomputes every forward: each of these has misled others.
"""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from parallel.layout import Layout
from tests.small import WORDS

ROOT = Path(__file__).resolve().parents[2]
NUM_EXPERTS, TOP_K, STEPS = 8, 2, 3
LAYOUT = Layout(dp=2, pp=2, ep=2)
RECIPE = """
defaults: [base, _self_]
model: {vocab_size: 320, hidden_size: 32, num_layers: 3, intermediate_size: 64, moe_intermediate_size: 16,
        num_experts: 8, top_k: 2, num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
        v_head_dim: 8, num_mtp_layers: 1, num_groups: 4, top_groups: 2}
data: {paths: [chats.jsonl], format: chat, packing: bucket, sequence_length: 256, validation_fraction: 0.2}
layout: {pp: 2, ep: 2, microbatches: 4}
cluster: {gpus_per_node: 1}
train: {steps: 3, batch_size: 16, save_every: 0, eval_every: 0, recompute: full}
balance: {bias_rate: 0.01}
telemetry: {window: 2, domains_every: 1, pairs_every: 2, routing_every: 1, times_every: 3}
"""

Row = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recount")
    stream = random.Random(0)
    chats = [
        {
            "instruction": " ".join(stream.choices(WORDS, k=stream.randint(1, 40))),
            "output": " ".join(stream.choices(WORDS, k=stream.randint(1, (4, 60)[number % 2]))),
            "domain": f"d{number % 3}",
        }
        for number in range(80)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "small.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-m", "launch", "train", "recipe=small.yaml", "run=r"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "r"


@pytest.fixture(scope="module")
def loads(run: Path) -> dict[tuple[int, str], Row]:
    rows = map(json.loads, (run / "expert_load.jsonl").read_text().splitlines())
    return {(row["step"], str(row["layer"])): row for row in rows}


Decisions = list[tuple[int, int, list[int], int]]  # source rank, microbatch, experts of a token, its domain


@pytest.fixture(scope="module")
def decisions(run: Path) -> dict[tuple[int, str], Decisions]:
    """What every token of a step chose in a layer, whichever rank it was on; padding is left out."""
    found: dict[tuple[int, str], Decisions] = {}
    for step in range(1, STEPS + 1):
        for rank in range(LAYOUT.world_size):
            saved = load_file(run / "routing" / f"step-{step}" / f"rank-{rank}.safetensors")
            place = LAYOUT.coordinates(rank)
            for name, experts in saved.items():
                layer, microbatch = name.split("/")
                if layer == "domains":
                    continue
                domains = saved[f"domains/{microbatch}"]
                assert len(domains) == len(experts)
                tokens = found.setdefault((step, layer), [])
                for chosen, domain in zip(experts.tolist(), domains.tolist(), strict=True):
                    if chosen[0] < NUM_EXPERTS:
                        tokens.append((place["ep"], place["dp"] * 4 + int(microbatch), chosen, domain))
    return found


def test_all_tokens_are_there(run: Path, decisions: dict[tuple[int, str], Decisions]) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    read = np.diff([0, *(row["tokens"] for row in metrics)])
    assert {layer for _, layer in decisions} == {"1", "2", "mtp0"}
    for (step, layer), tokens in decisions.items():
        missing = 16 if layer == "mtp0" else 0  # each sequence's last token has nothing two ahead of it
        assert len(tokens) == read[step - 1] - missing
    padded = sum(
        int((experts == NUM_EXPERTS).any(1).sum())
        for path in (run / "routing").rglob("*.safetensors")
        for name, experts in load_file(path).items()
        if not name.startswith("domains")
    )
    assert padded > 100, "nothing was padded"


def test_counts(loads: dict[tuple[int, str], Row], decisions: dict[tuple[int, str], Decisions]) -> None:
    assert loads.keys() == decisions.keys()
    for key, tokens in decisions.items():
        row, counts = loads[key], count(chosen for _, _, chosen, _ in tokens)
        assert row["counts"] == counts
        assert row["dead"] == counts.count(0) and row["dropped"] == 0
        assert row["max_vio"] == pytest.approx(violation(counts), rel=1e-12)
        share = [number / sum(counts) for number in counts if number]
        assert row["entropy"] == pytest.approx(-sum(p * math.log(p) for p in share) / math.log(NUM_EXPERTS))
        assert all(0 <= expert < NUM_EXPERTS for _, _, chosen, _ in tokens for expert in chosen)
        assert all(len(set(chosen)) == TOP_K for _, _, chosen, _ in tokens)


def test_windows(loads: dict[tuple[int, str], Row], decisions: dict[tuple[int, str], Decisions]) -> None:
    for (step, layer), row in loads.items():
        last = [decisions[each, layer] for each in range(max(1, step - 1), step + 1)]
        counts = count(chosen for tokens in last for _, _, chosen, _ in tokens)
        assert row["max_vio_window"] == pytest.approx(violation(counts), rel=1e-12)
        mean = sum(counts) / NUM_EXPERTS
        assert row["collapsing"] == sum(0 < number < mean / 10 for number in counts)


def test_microbatches(loads: dict[tuple[int, str], Row], decisions: dict[tuple[int, str], Decisions]) -> None:
    for key, tokens in decisions.items():
        each = [
            violation(count(chosen for _, number, chosen, _ in tokens if number == microbatch))
            for microbatch in range(8)
        ]
        assert loads[key]["max_vio_microbatch"] == pytest.approx(sum(each) / 8, rel=1e-12)
        assert loads[key]["max_vio_microbatch_max"] == pytest.approx(max(each), rel=1e-12)


def test_domains_and_pairs(
    loads: dict[tuple[int, str], Row], decisions: dict[tuple[int, str], Decisions]
) -> None:
    for (step, layer), tokens in decisions.items():
        row = loads[step, layer]
        for number, name in enumerate(("d0", "d1", "d2")):
            expected = count(chosen for _, _, chosen, domain in tokens if domain == number)
            assert row["domains"].get(name, [0] * NUM_EXPERTS) == expected
        assert ("pairs" in row) == (step == 2)
        if step == 2:
            both = Counter(pair for _, _, chosen, _ in tokens for pair in combinations(sorted(chosen), 2))
            assert row["pairs"] == [both[pair] for pair in combinations(range(NUM_EXPERTS), 2)]


def test_traffic(loads: dict[tuple[int, str], Row], decisions: dict[tuple[int, str], Decisions]) -> None:
    """Rows from rank to rank; each rank is a node of its own here, so that others lie over the network."""
    for key, tokens in decisions.items():
        expected = [[0, 0], [0, 0]]
        for source, _, chosen, _ in tokens:
            for expert in chosen:
                expected[source][expert // (NUM_EXPERTS // 2)] += 1
        row = loads[key]
        assert row["rank_rows"] == expected
        assert row["links"] == [expected[0][0] + expected[1][1], 0, expected[0][1] + expected[1][0]]
        assert row["row_bytes"] == 32 * 4


def test_times_and_timeline(run: Path, loads: dict[tuple[int, str], Row]) -> None:
    for (step, _), row in loads.items():
        assert ("expert_seconds" in row) == (step == 3)
        assert all(0 < seconds < 10 for seconds in row.get("expert_seconds", ()))
    timeline = json.loads((run / "timeline.json").read_text())
    assert (timeline["step"], timeline["ranks"], timeline["microbatches"]) == (3, 2, 4)
    for rank in range(2):
        spans = [span for span in timeline["spans"] if span[0] == rank]
        done = {action for _, text, _, _ in spans for action in text.split("&")}
        assert done == {f"{kind}{microbatch}" for kind in "FB" for microbatch in range(4)}
        assert all(a[2] <= a[3] <= b[2] for a, b in pairwise(spans))


def count(choices: Any) -> list[int]:
    found = Counter(expert for chosen in choices for expert in chosen)
    return [found[expert] for expert in range(NUM_EXPERTS)]


def violation(counts: list[int]) -> float:
    mean = sum(counts) / len(counts)
    return (max(counts) - mean) / mean
