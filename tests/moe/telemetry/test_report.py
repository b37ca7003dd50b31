"""The report of a small made-up run: its numbers, its page, and runs that lack something."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moe.telemetry.archive import Archive
from moe.telemetry.digest import read_run
from moe.telemetry.report import summary, write_report
from moe.telemetry.rows import JsonLines, read_rows


def expert_row(step: int, layer: int | str, counts: list[int], **extra: Any) -> dict[str, Any]:
    return {
        "step": step,
        "layer": layer,
        "counts": counts,
        "max_vio": max(counts) * len(counts) / sum(counts) - 1,
        "max_vio_window": 0.0,
        "entropy": 0.9,
        "dead": counts.count(0),
        "dropped": 2 if layer == "mtp0" else 0,
        "bias": [0.0] * len(counts),
        "rank_rows": [[5, 1], [3, 6]],
        "row_bytes": 1000,
        **extra,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a<b"
    folder.mkdir()
    (folder / "config.yaml").write_text("model:\n  window: 9\ntelemetry:\n  domains_every: 1\n  window: 2\n")
    (folder / "environment.json").write_text(json.dumps({"commit": "<c0ffee>", "hosts": ["one", "two"]}))
    (folder / "sample.txt").write_text("if a < b && c: <script>alert()</script>")
    with JsonLines(folder / "metrics.jsonl") as metrics:
        for step, speed in ((1, 10.0), (2, 3000.0), (3, 3100.0)):
            metrics.write(
                {
                    "step": step,
                    "tokens": 512 * step,
                    "loss": 4.0 - step,
                    "lr": 0.1,
                    "tokens_per_second": speed,
                }
            )
        for domain, loss in (("all", 2.0), ("code", 1.0), ("prose", 3.0)):
            metrics.write({"step": 1, "eval_loss": loss + 1, "domain": domain})
            metrics.write({"step": 3, "eval_loss": loss, "domain": domain})
    with JsonLines(folder / "expert_load.jsonl") as load:
        for step, counts in ((1, [4, 4]), (2, [8, 0]), (3, [2, 6])):
            load.write(expert_row(step, 1, counts, domains={"code": [1, 3]}))
            load.write(expert_row(step, "mtp0", [8, 0]))
    return folder


def test_summary(run_dir: Path) -> None:
    assert summary(run_dir) == [
        ("Steps", "3"),
        ("Tokens", "1,536"),
        ("Training loss", "1.500 (mean, last 2 steps)"),
        ("Validation loss", "2.000"),
        ("Perplexity", "7.39"),
        ("Tokens/s", "3,000 (median)"),
        ("MaxVio", "0.625 (mean over layers, last 2 steps)"),  # [10, 6] and [16, 0]: 0.25 and 1
        ("Dead experts", "1 of 4 (last 2 steps)"),
        ("Dropped tokens", "6"),
        ("Report", str(run_dir / "report.html")),
    ]


def test_the_digest_keeps_last_step_window_and_run_apart(run_dir: Path) -> None:
    run = read_run(run_dir)
    first, mtp = run.layers
    assert (first.layer, first.max_vio, first.max_vio_window, first.dead, first.dead_window) == (
        1,
        0.5,
        0.25,
        0,
        0,
    )
    assert (mtp.layer, mtp.max_vio_window, mtp.dead_window, mtp.dropped) == ("mtp0", 1.0, 1, 6)
    assert run.evaluated == {"all": 2.0, "code": 1.0, "prose": 3.0}
    assert run.sent_bytes.tolist() == [[30000, 6000], [18000, 36000]]  # 3 steps x 2 layers
    assert run.domain_max_vio == {"code": 0.5}


def test_alarms_are_counted_and_listed(run_dir: Path) -> None:
    with JsonLines(run_dir / "alarms.jsonl") as alarms:
        for step in range(1, 1002):
            alarms.write({"step": step, "kind": "max_vio", "layer": 1, "message": "layer 1: 3 < 4."})
    assert summary(run_dir)[-2:] == [("Alarms", "1,001"), ("Report", str(run_dir / "report.html"))]
    text = write_report(run_dir).read_text(encoding="utf-8")
    rows = Page(text).rows
    assert ["step\u00a01,001", "layer 1: 3 < 4."] in rows and ["step\u00a0901", "layer 1: 3 < 4."] not in rows
    assert "<h2>Alarms</h2>" in text and "The last 100 of 1,001." in text and "3 &lt; 4" in text


class Page(HTMLParser):
    """Open tags, addresses, and the text of table rows of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_the_page_is_whole_escaped_and_offline(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 2 and all(s.startswith("data:image/png;base64,iVBOR") for s in page.sources)
    assert not page.tags & {"script", "link", "b"} and not re.search(r"https?://|url\(|@import", text)
    assert "<title>a&lt;b</title>" in text and "Alarms" not in text
    assert "&lt;script&gt;alert()&lt;/script&gt;" in text and "&lt;c0ffee&gt;" in text
    assert ["1", "0.500", "0.250", "0.8113", "0", "0", "0"] in page.rows
    assert ["mtp0", "1.000", "1.000", "0.0000", "1", "1", "6"] in page.rows
    assert ["code", "1.000", "2.72", "0.500"] in page.rows
    assert ["rank 1", "18 kB", "36 kB"] in page.rows
    assert "Dispatch sent 24 kB" in text and "26.7%" in text  # (1 + 3) of 15 rows
    names = {p.name for p in run_dir.iterdir()}
    assert {"loss.png", "expert_load.png"} < names and not any(n.endswith(".tmp") for n in names)


def test_a_dense_run_without_evaluation_has_a_report(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "metrics.jsonl") as metrics:
        metrics.write({"step": 1, "tokens": 8, "loss": float("nan"), "lr": 0.1, "tokens_per_second": 7.0})
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == [] and len(page.sources) == 1
    values = dict(summary(tmp_path))
    assert values["Training loss"] == values["Validation loss"] == values["MaxVio"] == "–"  # noqa: RUF001


def test_a_run_that_never_finished_a_step_has_a_report(tmp_path: Path) -> None:
    assert write_report(tmp_path).exists()


def test_a_long_run_is_reported_with_its_archived_steps(run_dir: Path) -> None:
    (run_dir / "expert_load.jsonl").unlink()
    store = Archive(run_dir, full_steps=4, thin_steps=2, step=0)
    for step in range(1, 41):
        counts = [9, 3] if step <= 20 else [4, 4]
        store.write([expert_row(step, 1, counts, domains={"code": counts}), expert_row(step, "mtp0", [8, 0])])
    store.close()
    assert next(read_rows(run_dir / "expert_load.jsonl"))["step"] == 37  # the others are archived
    run = read_run(run_dir)
    first, mtp = run.layers
    assert (first.max_vio, first.max_vio_window, mtp.dropped) == (0.0, 0.0, 80)
    assert run.sent_bytes.tolist() == [[400000, 80000], [240000, 480000]]  # 40 steps x 2 layers
    assert run.domain_max_vio == {"code": pytest.approx(260 / 200 - 1)}
    assert run.recent.steps.tolist() == [39, 40] and run.load.spans.sum() == 40
    assert run.load.scalars["max_vio"][:, 0].tolist() == [0.5] * 10 + [0.0] * (len(run.load) - 10)
    assert ["mtp0", "1.000", "1.000", "0.0000", "1", "1", "80"] in Page(
        write_report(run_dir).read_text()
    ).rows
