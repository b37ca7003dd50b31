"""Decisions by what a run recorded: placement, imbalance, selection; and the commands around them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import compose, train
from launch.__main__ import main
from launch.chosen import recorded_scores, scores_file
from launch.place import STEPS
from launch.plan.estimate import with_ep
from launch.plan.imbalance import imbalance_of
from moe.config import LayoutConfig, RunConfig, TuneConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.placement import rank_rows
from moe.selection import Selection, read_selection, spread
from moe.telemetry.rows import JsonLines
from moe.train.loop import train as train_here
from moe.train.scoring import score
from moe.train.step import make_reader, read_batches
from parallel.errors import UserError
from parallel.groups import single
from tests.small import small_run

Printed = pytest.CaptureFixture[str]
EXPERTS = 8


def recorded_run(
    folder: Path, num_steps: int = 40, layout: LayoutConfig | None = None, seconds: bool = False, **model: Any
) -> Path:
    """A run's folder with load that is skewed alike in every step; layer 2's busy experts are neighbours."""
    folder.mkdir(parents=True)
    config = small_run(folder.parent, **model)
    config = replace(config, layout=layout or LayoutConfig(ep=2))
    (folder / "config.yaml").write_text(compose.write_yaml(config))
    (folder / "recipe.txt").write_text("tiny\n")
    stream = np.random.default_rng(0)
    ep = config.layout.ep
    with JsonLines(folder / "expert_load.jsonl") as loads, JsonLines(folder / "metrics.jsonl") as metrics:
        for step in range(1, num_steps + 1):
            metrics.write({"step": step, "loss": 1.0, "step_seconds": 2.0})
            for layer, mean in ((1, [50] * EXPERTS), (2, [400, 300, 200, 100, 25, 25, 25, 25])):
                row: dict[str, Any] = {"step": step, "layer": layer, "counts": stream.poisson(mean).tolist()}
                row["rank_rows"] = [[0] * ep] * ep
                if seconds and step % 10 == 0:
                    row["expert_seconds"] = [0.5] * (ep - 1) + [1.0]
                loads.write(row)
            metrics.write({"step": step, "eval_loss": 1.0, "domain": "all"})
    return folder


def counts_of(run: Path, layer: int, steps: range) -> Any:
    rows = map(json.loads, (run / "expert_load.jsonl").read_text().splitlines())
    return np.array([row["counts"] for row in rows if row["layer"] == layer and row["step"] in steps])


def imbalance(counts: Any, order: Sequence[int], ep: int) -> float:
    rows = rank_rows(counts, order, ep)
    return float(rows.max(1).mean() / rows.mean())


def test_the_prediction_is_of_steps_that_did_not_decide(tmp_path: Path, capsys: Printed) -> None:
    run, out = recorded_run(tmp_path / "base", seconds=True), tmp_path / "placement.json"
    assert main(["place-experts", str(run), "--steps", "20", "--out", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["ep"] == 2 and found["from"] == str(run) and found["steps"] == [21, 40]
    predicted = found["predicted"]
    assert (predicted["fitted"]["steps"], predicted["later"]["steps"]) == ([21, 30], [31, 40])
    assert list(found["placement"]) == ["1", "2"]
    kept, busiest = [], []
    for layer in (1, 2):
        later, order = counts_of(run, layer, range(31, 41)), found["placement"][str(layer)]
        pair = imbalance(later, range(EXPERTS), 2), imbalance(later, order, 2)
        assert predicted["later"]["layers"][str(layer)] == pytest.approx(pair)
        assert f"{pair[0]:7.3f}  {pair[1]:7.3f}   " in said
        kept.append(pair[1] / pair[0])
        busiest.append([rank_rows(later, each, 2).max(1).mean() for each in (range(EXPERTS), order)])
    assert kept[1] < 0.65  # 1000 of 1100 rows on the first rank
    before, after = np.sum(busiest, 0)
    assert predicted["later"]["decrease"] == pytest.approx(1 - after / before)
    assert predicted["fitted"]["decrease"] >= predicted["later"]["decrease"] - 0.02
    assert predicted["step_time"] == pytest.approx(3 * sum(1 - each for each in kept) / 2)  # 3 x 1 s of 2
    assert f"a step takes {predicted['step_time']:.1%} less time" in said and predicted["network"] is None


def test_stages_that_run_at_the_same_time_win_less(tmp_path: Path) -> None:
    won = []
    for name, degrees in (("one", {}), ("two", {"pp": 2}), ("both", {"pp": 2, "schedule": "dualpipe"})):
        run = recorded_run(tmp_path / name, 20, LayoutConfig(ep=2, **degrees), seconds=True)  # type: ignore[arg-type]
        assert main(["place-experts", str(run), "--out", str(tmp_path / "p.json")]) == 0
        won.append(json.loads((tmp_path / "p.json").read_text())["predicted"]["step_time"])
    assert won[1] == pytest.approx(won[0] / 2) and won[2] == pytest.approx(won[0])


def test_nodes_hold_groups_and_their_rows_are_told(tmp_path: Path, capsys: Printed) -> None:
    run = recorded_run(tmp_path / "base", num_groups=4, top_groups=2)
    out = tmp_path / "p.json"
    words = ["place-experts", str(run), "--ep", "4", "--gpus-per-node", "2", "--out", str(out)]
    assert main(words) == 0
    found = json.loads(out.read_text())
    for order in found["placement"].values():
        assert all(len({expert // 2 for expert in node}) == 2 for node in (order[:4], order[4:]))
    network, later = found["predicted"]["network"], range(21, 41)
    assert "is not known" in (said := capsys.readouterr().out) and "network: " in said
    counts = [counts_of(run, layer, later) for layer in (1, 2)]
    assert network["rows"] == pytest.approx(sum(c.sum(1).mean() for c in counts) / 2)
    after = sum(
        rank_rows(c, o, 2).max(1).mean() / 2 for c, o in zip(counts, found["placement"].values(), strict=True)
    )
    assert network["busiest_node_after"] == pytest.approx(after)
    assert network["busiest_node_after"] < 0.8 * network["busiest_node_before"]


def test_from_where_the_run_has_its_experts(tmp_path: Path, capsys: Printed) -> None:
    """What is placed well already stays, and nothing is won."""
    run, out = recorded_run(tmp_path / "base"), tmp_path / "p.json"
    assert main(["place-experts", str(run), "--out", str(out)]) == 0
    placed = json.loads(out.read_text())
    config = compose.read_yaml(run / "config.yaml")
    (run / "placement.json").write_bytes(out.read_bytes())
    config = replace(config, layout=replace(config.layout, placement="elsewhere.json"))
    (run / "config.yaml").write_text(compose.write_yaml(config))
    assert main(["place-experts", str(run), "--out", str(out)]) == 0
    again = json.loads(out.read_text())
    assert again["placement"] == placed["placement"] and again["predicted"]["later"]["decrease"] == 0
    said = capsys.readouterr().out.split("predicted: ")[-1]
    assert "nothing is won: " in said and "moves the experts" not in said.split("nothing is won")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--out", "p.json"], "but nowhere is no such folder"),
        (["base", "--ep", "3", "--out", "p.json"], "3 does not divide 8: use"),
        (["base", "--ep", "1", "--out", "p.json"], "`--ep` must be at least 2"),
        (["base", "--ep", "8", "--gpus-per-node", "3", "--out", "p.json"], "`--gpus-per-node` must divide"),
        (["base", "--steps", "1", "--out", "p.json"], f"`--steps` must be at least 2, but is 1: use {STEPS}"),
        (["base", "--out", "nowhere/p.json"], "`--out` must lie in an existing folder"),
        (["short", "--out", "p.json"], "by 2 recorded steps or more, but short has 1"),
        (["empty", "--out", "p.json"], "but empty recorded no step"),
        (["alone", "--out", "p.json"], "`--ep` must be at least 2, but is `layout.ep=1` of the run"),
    ],
)
def test_what_is_refused(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, steps in (("base", 4), ("short", 1), ("empty", 0)):
        recorded_run(tmp_path / name, steps)
    recorded_run(tmp_path / "alone", 4, LayoutConfig())
    assert main(["place-experts", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "p.json").exists()


def test_a_run_keeps_its_placement_and_can_be_moved_and_moved_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy in its folder counts, wherever that lies; an unfit file changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a few words of text, and some more\n" * 200)
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, _self_]\ndata: {paths: [text.txt]}\n"
        "model: {vocab_size: 300, num_layers: 2, num_experts: 8}\n"
    )
    file, other = tmp_path / "p.json", tmp_path / "other.json"
    file.write_text(json.dumps({"ep": 2, "placement": {"1": [7, 6, 5, 4, 3, 2, 1, 0]}}))
    other.write_text(json.dumps({"ep": 4, "placement": {"1": [1, 0, 2, 3, 4, 5, 6, 7]}}))

    def begin(*words: str) -> RunConfig:
        return train._begin(train.make_plan(["run=first", *words]))

    with pytest.raises(UserError, match=r"made for `layout\.ep=2`, but .*other\.json is for 4"):
        begin("recipe=mine.yaml", "layout.ep=2", "layout.placement=other.json")
    assert not Path("runs").exists()
    begin("recipe=mine.yaml", "layout.ep=2", "layout.placement=p.json")
    own = Path("runs/first/placement.json").resolve()
    assert own.read_bytes() == file.read_bytes()
    file.unlink()
    assert begin().layout.placement == str(own)
    with pytest.raises(UserError, match=r"made for `layout\.ep=4`, but .*placement\.json is for 2"):
        begin("layout.ep=4")
    assert train.read_settings(own.parent).layout.ep == 2
    assert begin("layout.ep=4", "layout.placement=other.json").layout.placement == str(own)
    assert own.read_bytes() == other.read_bytes()
    Path("runs/first").rename("runs/moved")
    moved = train.read_settings(Path("runs/moved")).layout.placement
    assert moved == str(Path("runs/moved/placement.json").resolve())
    Path("runs/moved").rename("runs/first")
    assert begin("layout.placement=null").layout.placement is None and not own.exists()
    assert begin().layout.placement is None


def test_plan_reckons_with_what_a_run_measured(tmp_path: Path, capsys: Printed) -> None:
    """For the ranks and the placement that are planned, not for those of the run."""
    run, out = recorded_run(tmp_path / "base"), tmp_path / "p.json"
    config = compose.read_yaml(run / "config.yaml")
    ratios = {
        ep: np.stack(
            [
                (rows := rank_rows(counts_of(run, layer, range(1, 41)), range(EXPERTS), ep)).max(1)
                / rows.mean(1)
                for layer in (1, 2)
            ]
        )
        for ep in (2, 4)
    }
    find = imbalance_of(str(run))
    for ep, expected in ratios.items():
        found = find(replace(config, layout=LayoutConfig(ep=ep)))
        assert found.greatest == pytest.approx(expected.max())
        assert np.mean(expected <= found.reckoned + 1e-9) >= 0.99 > np.mean(expected < found.reckoned - 1e-9)
        assert np.mean(expected <= found.median + 1e-9) >= 0.5
    assert main(["place-experts", str(run), "--out", str(out)]) == 0
    placed = replace(config, layout=LayoutConfig(ep=2, placement=str(out)))
    assert find(placed).reckoned < 1.2 < 1.7 < find(config).reckoned
    assert with_ep(placed, 1).layout.placement is None and with_ep(placed, 2).layout.placement == str(out)
    capsys.readouterr()
    small = [
        *("plan", "recipe=tiny", "model.num_experts=8", "layout.dp=4", "--imbalance", str(run), "--compare")
    ]
    assert main(small) == 0
    said = capsys.readouterr().out
    expected = imbalance_of(str(run))(compose.from_recipe("tiny", ["model.num_experts=8"]))
    assert f"experts of a rank receive {expected.reckoned:g} times the mean rows" in said
    assert f"{expected.median:.3f} in half of all steps and layers, {expected.reckoned:.3f} in 99 %" in said
    assert main([*small[:-1], "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["imbalance"] == expected.reckoned
    assert result["measured_imbalance"]["max"] == expected.greatest
    assert main(["plan", "recipe=tiny", "--imbalance", str(run)]) == 2  # of 16 experts
    assert "must name a run with 16 experts" in capsys.readouterr().err
    assert main(["plan", "recipe=tiny", "--imbalance", "nowhere"]) == 2
    assert "must be a number or the folder of a run, but is nowhere" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of one step, by the training loop."""
    folder = tmp_path_factory.mktemp("recorded")
    config = small_run(folder, num_mtp_layers=1, routed_scaling_factor=2.5)
    steps = replace(config.train, steps=1, eval_every=0)
    config = replace(config, train=steps, telemetry=replace(config.telemetry, domains_every=1))
    (folder / "run").mkdir()
    assert train_here(config, folder / "run") == 0
    (folder / "run" / "config.yaml").write_text(compose.write_yaml(config))
    return config, folder / "run"


def test_recorded_scores_are_those_of_a_scoring(trained: tuple[RunConfig, Path]) -> None:
    """Of the same tokens by the same weights, which are those before the step; and by domain they add up."""
    config, run = trained
    engine = make_reader(config, single(), torch.device("cpu"))
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.train, sequence_length=32, seed=config.train.seed, mask_documents=False)
    expected = score(engine, read_batches(loader, config, single(), 0), separate_documents=False)
    engine.close()
    _, found = recorded_scores(run, None)
    assert found.tokens == expected.tokens and found.token == expected.token
    for layer, values in expected.gate.items():
        assert found.gate[layer] == pytest.approx(values, rel=1e-5)
    weighted = np.zeros(EXPERTS)
    for domain in corpus.domains:
        _, own = recorded_scores(run, domain)
        assert not own.gate and sum(own.token["1"]) == pytest.approx(1)
        weighted += np.array(own.token["1"]) * own.tokens
    assert weighted / expected.tokens == pytest.approx(expected.token["1"])


def test_experts_are_selected_by_record(
    trained: tuple[RunConfig, Path], tmp_path: Path, capsys: Printed
) -> None:
    config, run = trained
    out = tmp_path / "chosen.json"
    words = ["select-experts", str(run), "--recorded", "--out", str(out)]
    assert main([*words, "--domain", "d1", "--threshold", "0.4"]) == 0
    scores = json.loads(scores_file(out).read_text())
    for layer, chosen in read_selection(out, config.model).experts.items():
        own = scores["token_scores"]["3" if layer == "mtp0" else layer]
        assert sum(own[str(expert)] for expert in chosen) >= 0.4 > sum(own[str(e)] for e in chosen[:-1])
    assert scores.keys() == {"tokens", "token_scores"} and "of 24 experts" in capsys.readouterr().out
    assert main([*words, "--score", "gate"]) == 0
    assert json.loads(scores_file(out).read_text()).keys() == {"tokens", "token_scores", "gate_scores"}
    assert "gate scores of" in capsys.readouterr().out
    for more, sentence in (
        (["--domain", "d1", "--score", "gate"], "since gates are not recorded by domain"),
        (["--domain", "law"], "`--domain` must be one that"),
        (["--sequences", "3"], "unrecognized arguments: --sequences 3"),
    ):
        assert main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err
    bare = recorded_run(tmp_path / "bare", 2)
    assert main(["select-experts", str(bare), "--recorded", "--score", "gate", "--out", str(out)]) == 2
    assert "where a run recorded no gates" in capsys.readouterr().err


def test_neither_needs_torch(trained: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "base")
    code = f"""
import sys
sys.modules["torch"] = None
from launch.__main__ import main
assert main(["place-experts", {str(run)!r}, "--out", {str(tmp_path / "p.json")!r}]) == 0
assert main(["select-experts", {str(trained[1])!r}, "--recorded", "--out", {str(tmp_path / "s.json")!r}]) == 0
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_from_where_a_fine_tuning_has_its_experts(tmp_path: Path) -> None:
    """Chosen experts were spread over the ranks, so the present order is not that of their numbers."""
    run, out = recorded_run(tmp_path / "base"), tmp_path / "p.json"
    config = compose.read_yaml(run / "config.yaml")
    tune = TuneConfig(method="esft", selection="elsewhere.json")
    (run / "config.yaml").write_text(compose.write_yaml(replace(config, tune=tune)))
    (run / "selection.json").write_text('{"experts": {"2": [0, 1, 2]}}')
    assert main(["place-experts", str(run), "--out", str(out)]) == 0
    order = spread(Selection(experts={"2": (0, 1, 2)}), ["1", "2"], EXPERTS, 2)["2"]
    before = json.loads(out.read_text())["predicted"]["later"]["layers"]["2"][0]
    assert before == pytest.approx(imbalance(counts_of(run, 2, range(21, 41)), order, 2))


@pytest.mark.parametrize("words", [[], ["--recorded"]])
def test_out_is_no_folder(tmp_path: Path, capsys: Printed, words: list[str]) -> None:
    run = recorded_run(tmp_path / "base")
    name = "select-experts" if words else "place-experts"
    assert main([name, str(run), *words, "--out", str(tmp_path)]) == 2
    assert "`--out` must be a file" in capsys.readouterr().err
