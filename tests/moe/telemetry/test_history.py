"""Archive and history: whatever was summed, cut, crashed or resumed, no count of a run is lost."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.telemetry import archive
from moe.telemetry.archive import EXPERT_LOAD, SEGMENTS, Archive, segments
from moe.telemetry.frames import SCALARS
from moe.telemetry.history import Follower, History, read_history
from moe.telemetry.rows import BadRow, JsonLines, read_rows

LAYERS, EXPERTS, RANKS = (1, 2, "mtp0"), 6, 3
PAIRS = EXPERTS * (EXPERTS - 1) // 2
Row = dict[str, Any]


@cache
def step_rows(step: int, ranks: int = RANKS) -> list[Row]:
    """The rows of a step, the same ones each time they are asked for."""
    rng = np.random.default_rng(step)
    rows = []
    for layer in LAYERS:
        row: Row = {"step": step, "layer": layer, "counts": rng.integers(0, 99, EXPERTS).tolist()}
        row |= {name: float(rng.random()) for name in SCALARS} | {"dropped": int(rng.integers(9))}
        row |= {"gate": rng.random(EXPERTS).tolist(), "bias": rng.normal(size=EXPERTS).tolist()}
        row |= {"rank_rows": rng.integers(0, 99, (ranks, ranks)).tolist(), "row_bytes": 64}
        row |= {"links": rng.integers(0, 99, 3).tolist()}
        if step % 3 == 0:
            row["domains"] = {name: rng.integers(0, 9, EXPERTS).tolist() for name in "ab"[: 1 + step % 2]}
            row["expert_seconds"] = rng.random(ranks).tolist()
        if step % 7 == 0:
            row["pairs"] = rng.integers(0, 9, PAIRS).tolist()
        rows.append(row)
    return rows


def write(folder: Path, steps: range, full: int = 16, thin: int = 4) -> None:
    store = Archive(folder, full, thin, steps[0] - 1)
    for step in steps:
        store.write(step_rows(step))
    store.close()


def write_plainly(folder: Path, steps: range) -> None:
    with JsonLines(folder / EXPERT_LOAD) as lines:
        for step in steps:
            lines.write(*step_rows(step))


def totals(history: History) -> dict[str, Any]:
    return {
        "steps": int(history.spans.sum()),
        "counts": history.counts.sum(0).tolist(),
        "dropped": history.scalars["dropped"].sum(0).tolist(),
        "received": history.received.sum(0).tolist(),
        "rank_rows": history.rank_rows.sum(0).tolist(),
        "sent_bytes": history.sent_bytes.sum(0).tolist(),
        "links": history.links.sum(0).tolist(),
        "domains": {name: counts.tolist() for name, counts in sorted(history.domains.items())},
        "pairs": None if history.pairs is None else history.pairs.tolist(),
    }


def expected(steps: Sequence[int]) -> dict[str, Any]:
    """The same totals, added up row by row."""
    rows = [row for step in steps for row in step_rows(step)]

    def by_layer(key: str) -> list[Any]:
        return [np.sum([row[key] for row in rows if row["layer"] == layer], 0).tolist() for layer in LAYERS]

    def sampled(layer: int | str, name: str) -> list[int]:
        found = [
            row["domains"][name] for row in rows if row["layer"] == layer and name in row.get("domains", {})
        ]
        return np.sum(found, 0).tolist()

    def matched(every: int) -> bool:
        return any(step % every == 0 for step in steps)

    matrices = np.sum([row["rank_rows"] for row in rows], 0)
    links = np.sum([row["links"] for row in rows], 0)
    pairs = [[row["pairs"] for row in rows if row["layer"] == layer and "pairs" in row] for layer in LAYERS]
    return {
        "steps": len(steps),
        "counts": by_layer("counts"),
        "dropped": by_layer("dropped"),
        "received": [np.sum(matrix, 0).tolist() for matrix in by_layer("rank_rows")],
        "rank_rows": matrices.tolist(),
        "sent_bytes": (64 * matrices).tolist(),
        "links": (64 * links).tolist(),
        "domains": {name: [sampled(layer, name) for layer in LAYERS] for name in "ab"} if matched(3) else {},
        "pairs": np.sum(pairs, 1).tolist() if matched(7) else None,
    }


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of few windows and blocks of few steps, so that a short run has several."""
    monkeypatch.setattr(archive, "SEGMENT_FRAMES", 6)
    monkeypatch.setattr(archive, "BLOCK_BYTES", 9000)


def test_rows_and_segments_hold_every_count_of_a_run(tmp_path: Path) -> None:
    write(tmp_path, range(1, 101))
    held = {row["step"] for row in read_rows(tmp_path / EXPERT_LOAD)}
    assert 16 <= len(held) <= 20 and len(segments(tmp_path)) == 4
    assert [segment.last % 4 for segment in segments(tmp_path)] == [0] * 4
    assert {path.suffix for path in (tmp_path / SEGMENTS).iterdir()} == {".parquet"}
    history = read_history(tmp_path)
    assert history.layers == LAYERS and history.steps[-1] == 100
    assert history.spans.tolist() == [4] * 21 + [1] * 16
    for view in (history, history.coarsened(7), read_history(tmp_path, most=7)):
        assert totals(view) == expected(range(1, 101))
    assert len(read_history(tmp_path, most=7)) <= 7


def test_a_window_keeps_means_greatest_and_last_values(tmp_path: Path) -> None:
    write(tmp_path, range(1, 101))
    history, rows = read_history(tmp_path), [step_rows(step)[1] for step in range(9, 13)]  # window 3, layer 2
    assert history.steps[2] == 12
    for name, rule in SCALARS.items():
        values = [row[name] for row in rows]
        wanted = {"mean": np.mean(values), "last": values[-1], "greatest": max(values), "sum": sum(values)}
        assert history.scalars[name][2, 1] == pytest.approx(wanted[rule], rel=1e-6), name
    counts, gate = (np.array([row[key] for row in rows]) for key in ("counts", "gate"))
    tokens = counts.sum(1, keepdims=True)  # in proportion
    assert history.gate[2, 1] == pytest.approx((tokens * gate).sum(0) / tokens.sum(), rel=5e-4)
    assert history.bias[2, 1] == pytest.approx(rows[-1]["bias"], rel=1e-6)
    assert history.expert_seconds[2, 1] == pytest.approx(
        (np.add(*(rows[i]["expert_seconds"] for i in (0, 3)))) / 2, rel=5e-4
    )


def test_a_crash_between_segment_and_cut_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Archive(tmp_path, 16, 4, 0)
    for step in range(1, 45):  # two segments were written, the second in the place of the first
        store.write(step_rows(step))
    monkeypatch.setattr(archive.shutil, "copyfileobj", lambda *_: pytest.fail("crash", pytrace=False))
    kept = {path: path.read_bytes() for path in (tmp_path / SEGMENTS).iterdir()}
    with pytest.raises(pytest.fail.Exception):
        for step in range(45, 99):
            store.write(step_rows(step))
            newest = step + 1
    for path, content in kept.items():
        path.write_bytes(content)  # as if the crash came before the old segment went
    assert segments(tmp_path)[-1].last >= next(read_rows(tmp_path / EXPERT_LOAD))["step"]
    assert totals(read_history(tmp_path)) == expected(range(1, newest + 1))
    monkeypatch.undo()
    write(tmp_path, range(newest + 1, 101))
    assert totals(read_history(tmp_path)) == expected(range(1, 101))
    assert {path for _, _, path in segments(tmp_path)} == set((tmp_path / SEGMENTS).iterdir())


@pytest.mark.parametrize("step", [90, 83])
def test_a_resume_inside_the_rows_gives_the_same_bytes(step: int, tmp_path: Path) -> None:
    for name, stretches in (("through", [range(1, 101)]), ("resumed", [range(1, 96), range(step + 1, 101)])):
        (tmp_path / name).mkdir()
        for stretch in stretches:
            write(tmp_path / name, stretch)
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    assert (through / EXPERT_LOAD).read_bytes() == (resumed / EXPERT_LOAD).read_bytes()
    assert totals(read_history(resumed)) == expected(range(1, 101))


def test_a_resume_inside_the_archive_drops_what_reaches_beyond(tmp_path: Path) -> None:
    write(tmp_path, range(1, 101))
    first = segments(tmp_path)[0]
    step = segments(tmp_path)[1].first + 5  # inside the second window of the second segment
    write(tmp_path, range(step + 1, 101))
    history = read_history(tmp_path)
    lost = {step - 1, step}  # of the window that straddled
    kept = [number for number in range(1, 101) if number not in lost]
    found, wanted = totals(history), expected(kept)
    assert {key: found[key] for key in found if key not in ("domains", "pairs")} == {
        key: wanted[key] for key in wanted if key not in ("domains", "pairs")
    }
    sampled = expected([n for n in range(1, 101) if n <= first.last or n > step])
    assert found["domains"] == sampled["domains"] and found["pairs"] == sampled["pairs"]


def test_rows_of_older_and_of_other_layouts_are_read(tmp_path: Path) -> None:
    bare = [{"step": 1, "layer": layer, "counts": [1, 2, 3, 4, 5, 6]} for layer in LAYERS]
    odd = [row | {"max_vio": None, "gate": [None, *row["gate"][1:]]} for row in step_rows(3, ranks=1)]
    with JsonLines(tmp_path / EXPERT_LOAD) as lines:
        for rows in (bare, step_rows(2), odd):
            lines.write(*rows)
    history = read_history(tmp_path)
    assert history.counts[0].tolist() == [[1, 2, 3, 4, 5, 6]] * 3 and not history.received[0].any()
    assert np.isnan(history.scalars["max_vio"][[0, 2]]).all() and np.isnan(history.bias[0]).all()
    assert history.rank_rows.shape == (3, RANKS, RANKS) and np.isnan(history.gate[2, 0, 0])
    assert history.rank_rows[2, 0, 0] == sum(row["rank_rows"][0][0] for row in odd)
    assert not history.rank_rows[2, 1:].any() and np.isnan(history.expert_seconds[2, :, 1:]).all()
    one = history.coarsened(1)
    assert one.scalars["max_vio"][0].tolist() == [np.float32(row["max_vio"]) for row in step_rows(2)]
    write(tmp_path, range(4, 60))
    assert read_history(tmp_path).counts.sum() == history.counts.sum() + np.sum(
        [row["counts"] for step in range(4, 60) for row in step_rows(step)]
    )


def test_nothing_written_is_a_history_of_no_frames(tmp_path: Path) -> None:
    for _ in range(2):
        history = read_history(tmp_path, 5)
        assert len(history) == 0 and history.layers == () and history.pairs is None
        (tmp_path / EXPERT_LOAD).touch()


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    write_plainly(tmp_path, range(1, 3))
    with (tmp_path / EXPERT_LOAD).open("a") as file:
        file.write('{"step":3,"layer":1,"counts":[1,\n')
    with pytest.raises(ValueError, match=r"expert_load\.jsonl.*not a JSON row"):
        read_history(tmp_path)


def test_frames_are_merged_over_equal_spans_of_steps(tmp_path: Path) -> None:
    write(tmp_path, range(1, 101))
    history = read_history(tmp_path)
    assert history.coarsened(37) is history and history.coarsened(1).spans.tolist() == [100]
    assert history.coarsened(36).spans.tolist() == [4] * 21 + [2] * 8
    assert history.coarsened(28).spans.tolist() == [4] * 25
    assert history.coarsened(24).spans.tolist() == [8] * 12 + [4]
    assert history.coarsened(24).coarsened(7).spans.tolist() == [16] * 6 + [4]
    assert history.after(84).steps.tolist() == list(range(85, 101))


def test_a_follower_sees_growth_and_half_lines(tmp_path: Path) -> None:
    follower = Follower(tmp_path, 50)
    assert not follower.poll() or not len(follower.history)
    write_plainly(tmp_path, range(1, 4))
    assert follower.poll() and follower.history.steps.tolist() == [1, 2, 3]
    assert not follower.poll()
    text = "".join(json.dumps(row) + "\n" for row in step_rows(4))
    with (tmp_path / EXPERT_LOAD).open("a") as file:
        file.write(text[:-40])  # two rows and a half of the three
        file.flush()
        assert not follower.poll() and len(follower.history) == 3
        file.write(text[-40:])
    assert follower.poll() and totals(follower.history) == expected(range(1, 5))
    assert follower.epoch == 0


def test_a_follower_of_a_first_step_half_written_starts_over(tmp_path: Path) -> None:
    follower = Follower(tmp_path, 50)
    with JsonLines(tmp_path / EXPERT_LOAD) as lines:
        lines.write(step_rows(7)[0])
        assert follower.poll() and follower.history.layers == (1,)
        lines.write(*step_rows(7)[1:], *step_rows(8))
        assert follower.poll() and follower.epoch == 1
    assert totals(follower.history) == expected([7, 8])


@pytest.mark.parametrize("pause", [1, 9, 70])
def test_a_follower_keeps_up_while_steps_are_archived(pause: int, tmp_path: Path) -> None:
    follower = Follower(tmp_path, 200)
    store = Archive(tmp_path, 16, 4, 0)
    for step in range(1, 141):
        store.write(step_rows(step))
        if step % pause == 0:
            assert follower.poll() and follower.history.last == step
    store.close()
    follower.poll()
    assert totals(follower.history) == expected(range(1, 141))
    assert (follower.epoch > 0) == (pause > 20)  # only who comes later than rows are kept has to start over


def test_a_follower_holds_few_frames(tmp_path: Path) -> None:
    follower = Follower(tmp_path, 10)
    store, epochs = Archive(tmp_path, 16, 4, 0), set()
    for step in range(1, 141):
        store.write(step_rows(step))
        follower.poll()
        assert len(follower.history) <= 20
        epochs.add(follower.epoch)
    assert epochs >= {0, 1, 2} and totals(follower.history) == expected(range(1, 141))
    assert follower.history.spans.max() <= 2 * 140 / 10


@pytest.mark.parametrize(("back", "epoch"), [(30, 0), (25, 1), (3, 1)])
def test_a_follower_goes_back_with_a_resumed_run(back: int, epoch: int, tmp_path: Path) -> None:
    write(tmp_path, range(1, 31))
    follower = Follower(tmp_path, 100)
    follower.poll()
    store = Archive(tmp_path, 16, 4, back)
    for step in range(back + 1, 36):  # other numbers than before, and past where the run had been
        store.write([row | {"dropped": 1000} for row in step_rows(step)])
    store.close()
    assert follower.poll() and follower.epoch == epoch
    fresh = read_history(tmp_path)
    assert totals(follower.history) == totals(fresh) and follower.history.last == 35
    assert fresh.scalars["dropped"][-1].tolist() == [1000] * 3


def test_a_follower_of_a_run_that_began_anew(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    follower = Follower(tmp_path, 50)
    follower.poll()
    Archive(tmp_path, 16, 4, 0).close()  # killed before its first checkpoint
    assert follower.poll() and len(follower.history) == 0 and follower.epoch == 1
    write(tmp_path, range(1, 4))
    assert follower.poll() and totals(follower.history) == expected(range(1, 4))


@pytest.mark.parametrize("line", ["5,6]}", "[]", '"step"', "{}"])
def test_a_line_without_a_step_is_named(line: str, tmp_path: Path) -> None:
    write_plainly(tmp_path, range(1, 3))
    with (tmp_path / EXPERT_LOAD).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(BadRow, match=re.escape(line)):
        read_history(tmp_path)
    with pytest.raises(BadRow, match=re.escape(line)):
        Archive(tmp_path, 16, 4, 2)
