"""Scores of experts: what the router did, counted by hand, under any layout; and the command around them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch import adapter, compose, select
from launch.chosen import scores_file
from launch.scores import select as select_on_rank
from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.model.router import Router
from moe.rules import validate
from moe.selection import read_selection
from moe.train.evaluate import rounds
from moe.train.scoring import Scores, score
from moe.train.state import Position
from moe.train.step import local_batch_size, make_reader, open_loader
from moe.train.world import groups_of
from parallel.errors import UserError
from parallel.groups import Groups, single
from tests.moe.train.test_state import save
from tests.moe.train.test_step import steps
from tests.ranks import run_ranks
from tests.small import small_run

SEQUENCES = 6  # no multiple of a round


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """Settings and the folder of a run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_run(folder, num_mtp_layers=1, routed_scaling_factor=2.5)
    trainer, _ = steps(config, 1, 0, 1)
    save(trainer, folder / "base" / "checkpoints", Position(1, 8, 500))
    (folder / "base" / "config.yaml").write_text(compose.write_yaml(config))
    (folder / "base" / "hf").mkdir()
    tokenizer = prepare(config.data, 320).tokenizer_path
    (folder / "base" / "hf" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return config, folder / "base"


def scored(config: RunConfig, folder: Path, groups: Groups | None = None) -> Scores:
    config = replace(config, train=replace(config.train, init=str(folder)))
    engine = make_reader(config, groups or single(), torch.device("cpu"))
    assert list(engine.zero.segments()) == []  # nothing to train: no gradients, no moments
    loader = open_loader(prepare(config.data, config.model.vocab_size).train, config)
    batches = rounds(loader, engine.groups, SEQUENCES, local_batch_size(config, engine.groups))
    found = score(engine, batches, separate_documents=False)
    engine.close()
    return found


def on_ranks(rank: int, world_size: int, config: RunConfig, folder: Path) -> Scores:
    with groups_of(validate(config, world_size)) as groups:
        return scored(config, folder, groups)


def test_scores_are_what_the_router_did(run: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ratios add up to 1; normalised gates too, whatever they are scaled with."""
    config, folder = run
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = Router.forward

    def watched(self: Router, hidden: torch.Tensor, valid: torch.Tensor):  # type: ignore[no-untyped-def]
        weights, loss, routing = forward(self, hidden, valid)
        seen.append((weights, routing.experts_TK))
        return weights, loss, routing

    monkeypatch.setattr(Router, "forward", watched)
    found = scored(config, folder)
    assert set(found.token) == {"1", "2", "mtp0"}
    first = [(w, e) for place, (w, e) in enumerate(seen) if place % 3 == 0]  # of layer 1
    weights, experts = (torch.cat([pair[which] for pair in first]) for which in (0, 1))
    real = experts[:, 0] < 8
    assert int(real.sum()) == found.tokens
    for expert in range(8):
        chosen = (experts == expert) & real[:, None]
        assert found.token["1"][expert] == pytest.approx(int(chosen.sum()) / (2 * found.tokens), abs=1e-12)
        gate = float(weights[chosen].double().sum()) / 2.5 / found.tokens
        assert found.gate["1"][expert] == pytest.approx(gate, rel=1e-6)
    for layers in (found.token, found.gate):
        assert all(sum(values) == pytest.approx(1.0, rel=1e-6) for values in layers.values())


def test_layouts_score_alike(run: tuple[RunConfig, Path]) -> None:
    config, folder = run
    alone = scored(config, folder)
    layout = LayoutConfig(tp=2, pp=2, ep=2, microbatches=2)
    for found in run_ranks(4, on_ranks, replace(config, layout=layout), folder):
        assert found.tokens == alone.tokens and found.token == alone.token
        for layer, values in alone.gate.items():
            assert found.gate[layer] == pytest.approx(values, rel=1e-5)


def test_the_command_writes_a_selection_that_can_be_trained(
    run: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its scores, as ESFT's scripts read them; data that the run never saw is cut by its tokenizer."""
    config, folder = run
    other = tmp_path / "law.jsonl"
    other.write_text((folder.parent / "corpus.jsonl").read_text().split("\n", 20)[-1])
    out = tmp_path / "law.json"
    words = [str(folder), f"data.paths=[{other}]", "--sequences", "5", "--out", str(out)]
    plan = select.make_plan(words)
    assert plan.threshold == 0.2 and plan.score == "token"
    assert plan.config.data.tokenizer == str(folder / "hf" / "tokenizer.json")
    assert select.make_plan([*words, "--score", "gate"]).threshold == 0.1
    select_on_rank(plan)
    printed = capsys.readouterr().out
    selection = read_selection(out, config.model)
    scores = json.loads(scores_file(out).read_text())
    assert scores.keys() == {"tokens", "token_scores", "gate_scores"} and scores["token_scores"].keys() == {
        *("1", "2", "3")
    }
    for layer, chosen in selection.experts.items():
        own = scores["token_scores"]["3" if layer == "mtp0" else layer]
        assert sum(own[str(expert)] for expert in chosen) >= 0.2 > sum(own[str(e)] for e in chosen[:-1])
        assert f"{len(chosen):>7}  {' '.join(map(str, chosen))}" in printed
    assert "of 24 experts" in printed
    with pytest.raises(UserError, match="must lie above 0"):
        select.make_plan([*words, "--threshold", "0"])
    with pytest.raises(UserError, match="weights must come from"):
        select.make_plan([str(tmp_path), *words[1:]])
    with pytest.raises(UserError, match=r"`tune\.method` of .* must be esft, but is full"):
        adapter.to_esft([str(folder), str(tmp_path / "adapter")])
