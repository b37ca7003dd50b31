"""What the page is given: numbers recounted from the rows, and views that join while a run goes on."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from launch.dashboard.chance import preferred, together
from launch.dashboard.curves import Curves
from launch.dashboard.facts import facts, placement
from launch.dashboard.view import RunView, as_json, load
from moe.selection import Selection, spread
from moe.telemetry.rows import JsonLines, read_rows
from tests.made_run import DOMAINS, make_run

FRAMES = {"load": "<u2", "bias": "<f4", "received": "<f4", "expert_seconds": "<f4"}


def unpacked(text: str, kind: str, *shape: int) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


def rows_of(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    return {(row["step"], str(row["layer"])): row for row in read_rows(folder / "expert_load.jsonl")}


def test_frames_are_the_rows(tmp_path: Path) -> None:
    make_run(tmp_path, layers=3, steps=14, mtp=True)
    rows, view = rows_of(tmp_path), RunView(tmp_path, "mine").view()
    assert view["layers"] == ["1", "2", "3", "mtp0"]
    assert (view["num_experts"], view["num_ranks"], view["partial"]) == (16, 4, False)
    frames, size = view["frames"], (14, 4)
    assert frames["step"] == list(range(1, 15)) and frames["span"] == [1] * 14
    shown = {
        key: unpacked(frames[key], kind, *size, 16 if i < 2 else 4)
        for i, (key, kind) in enumerate(FRAMES.items())
    }
    scalars = {key: unpacked(text, "<f4", *size) for key, text in frames["scalars"].items()}
    assert {
        "max_vio",
        "max_vio_window",
        "entropy",
        "dead",
        "dropped",
        "margin",
        "logit_rms",
    } <= scalars.keys()
    for (step, layer), row in rows.items():
        at = step - 1, view["layers"].index(layer)
        total = sum(row["counts"])
        assert shown["load"][at].tolist() == [max(round(c * 16 * 256 / total), c > 0) for c in row["counts"]]
        assert shown["bias"][at] == pytest.approx(row["bias"])
        received = [sum(column) for column in zip(*row["rank_rows"], strict=True)]
        assert shown["received"][at] == pytest.approx([4 * rows / total for rows in received])
        times = row.get("expert_seconds", [float("nan")] * 4)
        assert shown["expert_seconds"][at] == pytest.approx(times, nan_ok=True)
        for key, values in scalars.items():
            assert values[at] == pytest.approx(row[key], abs=1e-6), key
    assert (shown["load"][0, 0, [1, 8]] == 0).all()  # the made run begins with these two dead


def test_traffic_is_of_the_whole_run(tmp_path: Path) -> None:
    make_run(tmp_path, layers=2, steps=5)
    rows, traffic = rows_of(tmp_path).values(), RunView(tmp_path, "mine").view()["traffic"]
    for sender in range(4):
        for receiver in range(4):
            sent = sum(row["rank_rows"][sender][receiver] * row["row_bytes"] for row in rows)
            assert traffic["bytes"][sender][receiver] == sent
    links = [sum(row["links"][link] * row["row_bytes"] for row in rows) for link in range(3)]
    assert [traffic["kept"], traffic["nvlink"], traffic["network"]] == links and all(links)


def test_domains_and_timeline(tmp_path: Path) -> None:
    make_run(tmp_path, layers=2, steps=12)
    view = RunView(tmp_path, "mine").view()
    names, share = view["domains"]["names"], unpacked(view["domains"]["share"], "<f4", 5, 2, 16)
    assert names == sorted(DOMAINS)
    sampled = [row for row in rows_of(tmp_path).values() if "domains" in row]
    assert len(sampled) == 4  # two layers, steps 1 and 11
    counts = np.array([[row["domains"][name] for row in sampled if row["layer"] == 2] for name in names]).sum(
        1
    )
    assert share[:, 1] == pytest.approx(counts / counts.sum(1, keepdims=True))
    assert all(domain in names and layer in ("1", "2") for domain, layer, *_ in view["domains"]["preferred"])
    assert view["pairs"] is not None
    assert view["timeline"] == json.loads((tmp_path / "timeline.json").read_text())


def test_the_load_of_an_expert_fits_sixteen_bits() -> None:
    assert load(np.array([[0, 1, 2, 1]])).tolist() == [[0, 256, 512, 256]]
    assert load(np.array([0, 0])).tolist() == [0, 0]
    crowded = np.zeros(300, dtype=np.int64)
    crowded[0], crowded[1] = 10**9, 1
    assert load(crowded)[:3].tolist() == [65535, 1, 0]


def test_preferences_beyond_chance() -> None:
    random = np.random.default_rng(0)
    counts = random.multinomial(4000, np.full(16, 1 / 16), (6, 3))  # no preference anywhere
    assert preferred(counts, 4, 200) == []
    counts[2, 1, 5] += 300
    found = preferred(counts, 4, 200)
    domain, layer, expert, ratio, z = found[0]
    assert (domain, layer, expert) == (2, 1, 5) and z > 5
    one, all_ = counts[2, 1], counts[:, 1].sum(0)
    assert ratio == pytest.approx(one[5] / one.sum() / (all_[5] / all_.sum()))
    # the two-proportion test of tokens that choose the expert, in the domain and in all others
    tokens, others = one.sum() / 4, (all_.sum() - one.sum()) / 4
    chose, pooled = one[5] / tokens, 4 * all_[5] / all_.sum()
    rest = (all_[5] - one[5]) / others
    assert z == pytest.approx((chose - rest) / np.sqrt(pooled * (1 - pooled) * (1 / tokens + 1 / others)))
    assert len(preferred(counts * 50, 4, 7)) == 7


def test_pairs_beyond_chance() -> None:
    random = np.random.default_rng(0)
    num_experts, tokens = 12, 20_000
    upper = np.triu_indices(num_experts, 1)

    def count(bound: bool) -> NDArray[np.int64]:
        scores = random.gumbel(size=(tokens, num_experts))
        if bound:
            scores[: tokens // 8, [2, 7]] += 9.0
        chosen = np.zeros((tokens, num_experts), dtype=np.int64)
        np.put_along_axis(chosen, np.argsort(-scores, 1)[:, :3], 1, 1)
        return (chosen.T @ chosen)[upper][None]

    assert together(count(bound=False), 200) == []
    pairs = count(bound=True)
    layer, i, j, ratio, observed = together(pairs, 200)[0]
    index = [(a, b) for a, b in zip(*upper, strict=True)].index((2, 7))
    assert (layer, i, j, observed) == (0, 2, 7, pairs[0, index]) and ratio > 1.5
    assert together(np.zeros((2, 66), dtype=np.int64), 200) == []


def test_curves_are_means_over_spans() -> None:
    curves = Curves(4)
    for step in range(1, 12):
        curves.add({"step": step, "loss": float(step), "mfu": None if step < 5 else step / 10})
    assert curves.doublings == 2  # 11 steps in 3 points of 4
    points = curves.points(-1, 11)
    assert points["step"] == [4, 8, 11]
    assert points["loss"] == [2.5, 6.5, 10.0]
    assert points["mfu"] == [None, pytest.approx(0.65), pytest.approx(1.0)]
    assert points["grad_norm"] == [None, None, None]
    rest = curves.points(6, 10)
    assert rest["step"] == [8, 10] and rest["loss"] == [7.5, 9.5]
    assert curves.points(11, 11)["loss"] == []


@pytest.mark.parametrize(("rows", "doublings"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_points_never_exceed_what_a_page_holds(rows: int, doublings: int) -> None:
    curves = Curves(4)
    for step in range(rows):
        curves.add({"step": step})
    assert curves.doublings == doublings and len(curves.points(-1, rows)["step"]) <= 4


def test_partial_views_join_to_the_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path, layers=2, steps=3)
    view = RunView(tmp_path, "mine")
    parts = [view.view()]
    for steps in (1, 4, 2):
        run.advance(steps)
        run.alarm(f"after {run.step}")
        view.poll()
        parts.append(view.view(parts[-1]["frames"]["step"][-1], parts[0]["epoch"]))
    assert [part["partial"] for part in parts] == [False, True, True, True]
    assert [part["frames"]["step"] for part in parts[1:]] == [[4], [5, 6, 7, 8], [9, 10]]
    whole = view.view()
    for key, values in whole["metrics"].items():
        assert values == [value for part in parts for value in part["metrics"][key]], key
    assert whole["alarms"] == [alarm for part in parts for alarm in part["alarms"]]
    for key in FRAMES:
        assert base64.b64decode(whole["frames"][key]) == b"".join(
            base64.b64decode(part["frames"][key]) for part in parts
        ), key
    assert {key: whole[key] for key in ("facts", "domains", "traffic")} == {
        key: parts[-1][key] for key in ("facts", "domains", "traffic")
    }


def test_a_resumed_run_is_given_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, layers=2, steps=6)
    view = RunView(tmp_path, "mine")
    before = view.view()
    run.rewind(3)
    run.advance(1)
    view.poll()
    after = view.view(before["frames"]["step"][-1], before["epoch"])
    assert after["epoch"] > before["epoch"] and not after["partial"]
    assert after["metrics"]["step"] == after["frames"]["step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("steps", "ranks"), [(0, 2), (6, 4)])
def test_a_view_is_whole_where_its_shape_is_another(tmp_path: Path, steps: int, ranks: int) -> None:
    """The first step comes, or a run goes on with more ranks: what a page holds has another width."""
    run = make_run(tmp_path, layers=2, ranks=2, steps=steps)
    view = RunView(tmp_path, "mine")
    run.rewind(min(steps, 3), ranks)
    view.poll()
    before = view.view()
    run.advance(1)
    view.poll()
    after = view.view(before["metrics"]["step"][-1] if steps else 0, before["epoch"])
    assert after["num_ranks"] == ranks and not after["partial"]


def test_a_run_that_went_on_with_fewer_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path, layers=2, experts=8, ranks=4, steps=3)
    run.rewind(3, 2)
    run.advance(1)
    shown = RunView(tmp_path, "mine").view()
    assert shown["num_ranks"] == 4 and shown["placement"] == [[0] * 4 + [1] * 4] * 2
    received = unpacked(shown["frames"]["received"], "<f4", 4, 2, 4)
    assert received[:3].mean(-1) == pytest.approx(1) and received[3, :, :2].mean(-1) == pytest.approx(1)


def test_what_is_written_after_its_step_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, layers=2, steps=3, total_steps=3)
    view = RunView(tmp_path, "mine")
    marks = [view.mark()]
    with JsonLines(tmp_path / "metrics.jsonl") as file:
        file.write({"step": run.step, "eval_loss": 2.5, "domain": "all"})
    view.poll()
    marks.append(view.mark())
    (tmp_path / "timeline.json").write_text(json.dumps({"step": run.step, "spans": []}))
    assert marks[0] != marks[1] != view.mark()


def test_an_alarm_of_a_step_that_was_shown_is_not_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path, layers=2, steps=6)
    view = RunView(tmp_path, "mine")
    before = view.view()
    run.alarm("late", layer=1, expert=3)
    view.poll()
    after = view.view(6, before["epoch"])
    assert [alarm["message"] for alarm in after["alarms"]] == ["late"] and not after["partial"]


def test_a_step_is_shown_when_all_of_it_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, layers=2, steps=4)
    view = RunView(tmp_path, "mine")
    with JsonLines(tmp_path / "metrics.jsonl") as file:
        file.write({"step": 5, "loss": 1.0, "tokens": 5})
    run.alarm("early", step=5)
    view.poll()
    assert view.view()["metrics"]["step"] == [1, 2, 3, 4] and view.view()["alarms"] == []
    rows = [{**row, "step": 5} for (step, _), row in rows_of(tmp_path).items() if step == 4]
    path = tmp_path / "expert_load.jsonl"
    with JsonLines(path) as file:
        file.write(rows[0])
    text = path.read_bytes() + json.dumps(rows[1]).encode()
    path.write_bytes(text)  # the last row lacks its end
    view.poll()
    assert view.mark()["step"] == 4
    path.write_bytes(text + b"\n")
    view.poll()
    shown = view.view()
    assert shown["metrics"]["step"][-1] == shown["frames"]["step"][-1] == view.mark()["step"] == 5
    assert [alarm["message"] for alarm in shown["alarms"]] == ["early"]


def test_state(tmp_path: Path) -> None:
    make_run(tmp_path, layers=2, steps=3, total_steps=4)
    view = RunView(tmp_path, "mine")
    assert view.view()["state"] == "running" and view.view()["steps_total"] == 4
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert view.view()["state"] == "ended"
    with JsonLines(tmp_path / "metrics.jsonl") as file:
        file.write({"step": 4})
    view.poll()
    assert view.view()["state"] == "finished"


def test_slow_steps_are_waited_for(tmp_path: Path) -> None:
    make_run(tmp_path, layers=2, steps=1)
    with JsonLines(tmp_path / "metrics.jsonl") as file:
        file.write({"step": 2, "step_seconds": 100.0})
    old = os.stat(tmp_path).st_mtime - 600
    for path in tmp_path.iterdir():
        os.utime(path, (old, old))
    assert RunView(tmp_path, "mine").view()["state"] == "running"  # steps take 50 s in the mean


def test_runs_without_experts_and_without_a_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    view = RunView(tmp_path, "mine")
    assert json.loads(as_json(view.view()))["layers"] == []
    with JsonLines(tmp_path / "metrics.jsonl") as file:
        file.write({"step": 1, "loss": None, "tokens": 5})
        file.write({"step": 1, "eval_loss": 2.5, "perplexity": 12.2, "domain": "all"})
    view.poll()
    shown = json.loads(as_json(view.view()))
    assert shown["metrics"]["step"] == [1] and shown["metrics"]["loss"] == [None]
    assert shown["evaluations"] == {"all": [[1, 2.5]]}
    assert shown["domains"] is None and shown["pairs"] is None and shown["timeline"] is None


def test_placement(tmp_path: Path) -> None:
    assert placement([1, "mtp0"], 4, 2, {"1": [3, 0, 2, 1]}) == [[0, 1, 1, 0], [0, 0, 1, 1]]
    make_run(tmp_path, layers=2, experts=8, ranks=4, steps=1)
    (tmp_path / "placement.json").write_text(json.dumps({"placement": {"2": [7, 6, 5, 4, 3, 2, 1, 0]}}))
    assert RunView(tmp_path, "mine").view()["placement"] == [
        [0, 0, 1, 1, 2, 2, 3, 3],
        [3, 3, 2, 2, 1, 1, 0, 0],
    ]


def test_chosen_experts_are_where_they_were_spread(tmp_path: Path) -> None:
    make_run(tmp_path, layers=1, experts=8, ranks=2, steps=1, mtp=True)
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text()) | {"tune": {"method": "esft"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "selection.json").write_text(json.dumps({"experts": {"1": [0, 1, 2], "2": [7]}}))
    orders = spread(Selection(experts={"1": (0, 1, 2), "mtp0": (7,)}), ["1", "mtp0"], 8, 2)
    shown = RunView(tmp_path, "mine").view()["placement"]
    assert shown == [[orders[name].index(e) // 4 for e in range(8)] for name in ("1", "mtp0")]
    assert shown[0][:4] == [0, 1, 0, 0]


def test_facts() -> None:
    settings = {
        "model": {"num_layers": 27, "num_experts": 64, "top_k": 6},
        "layout": {"tp": 1, "pp": 2, "dp": None, "ep": 8, "schedule": "dualpipe", "microbatches": 4},
        "balance": {"bias": "none", "sequence_aux": 0.001},
        "train": {"steps": 1000},
    }
    surroundings = {
        "ranks": 16,
        "device": "H100",
        "packages": {"torch": "2.13.0"},
        "git": {"commit": "a" * 40},
    }
    told = dict(facts(settings, surroundings, "v2\n", {"step": 1200, "tokens": 3_000_000}))
    assert told == {
        "Recipe": "v2",
        "Model": "27 layers, 64 experts, top 6",
        "Layout": "dp8·pp2·ep8, dualpipe, 4 microbatches",
        "Balance": "no bias, sequence loss 0.001",
        "Steps": "1,200 of 1,000",
        "Tokens": "3,000,000",
        "Machine": "16 x H100",
        "Versions": "torch 2.13.0, commit aaaaaaaaaa",
    }
    assert facts({}, {}, "", {}) == [("Steps", "0")]
