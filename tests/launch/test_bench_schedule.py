"""`bench schedule` end to end: every schedule on real ranks, beside its simulation."""

import json
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.bench import schedule, walks
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.schedules import FORMS
from parallel.pipeline.simulate import simulate


def test_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "FOLDER", tmp_path)
    monkeypatch.setattr(schedule, "SECONDS", 0.004)
    path = tmp_path / "walks.json"
    words = ["--ranks", "2", "--microbatches", "4", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "schedule", *words]) == 0
    rows = {row["schedule"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(FORMS)
    for name, row in rows.items():
        assert set(row["costs"]) == {"F", "B", "W", "full B", "F&B"}
        assert row["simulated_seconds"] > 4 * 0.012  # no rank has less to do
        assert row["measured_seconds"] > 4 * 0.012
        assert (tmp_path / f"measured-{name}-2-4.png").stat().st_size > 10_000


def test_a_slot_is_priced_by_what_it_does() -> None:
    costs = {"F": 1.0, "B": 10.0, "W": 100.0, "full B": 1000.0, "F&B": 10000.0}
    both = dualpipe(2, 4)
    found = [walks._price(both, costs, slot).seconds for slot in both.slots[0]]
    assert found == [1.0, 1.0, 1.0, 1000.0, 10000.0, 1000.0, 10.0, 100.0]
    alone = one_f_one_b(1, 2)
    timeline = simulate(alone, lambda slot: walks._price(alone, costs, slot))
    assert timeline.makespan == 2002.0
