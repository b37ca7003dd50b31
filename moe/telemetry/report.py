"""What happened in a run, on one page that needs no network: `report.html` and its pictures. No torch.

The page holds everything it shows: pictures as base64, style inline, no script. Every text that comes
from the run is escaped.
"""

import base64
import html
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.telemetry.digest import ALL, Run, read_run
from moe.telemetry.plots import plot_expert_load, plot_loss
from moe.telemetry.rows import read_rows, replace_file

NONE = "–"  # noqa: RUF001 (a dash stands for "no value")
ALARMS = "alarms.jsonl"
MAX_ALARMS = 100  # of the list; more are in the file
MAX_RANK_COLUMNS = 16  # of the table of bytes between ranks; more do not fit a page

STYLE = """
:root { color-scheme: light; }
body {
  margin: 0 auto; max-width: 68rem; padding: 3rem 1.5rem 5rem; color: #1f2933; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 1.75rem; font-size: 1.9rem; letter-spacing: -0.02em; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.2rem; letter-spacing: -0.01em; }
p { margin: 0.4rem 0 0.9rem; max-width: 44rem; color: #52606d; }
dl { display: flex; flex-wrap: wrap; gap: 1.2rem 1.5rem; margin: 0; }
dl div { width: 11.5rem; }
dt, small { color: #66727f; font-size: 0.82rem; font-weight: 400; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; overflow-wrap: anywhere; }
dd, table { font-variant-numeric: tabular-nums; }
small { display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 1.1rem 0.3rem 0; text-align: right; border-bottom: 1px solid #e4e7eb; }
th { color: #66727f; font-weight: 500; vertical-align: bottom; border-bottom-color: #9aa5b1; }
td { white-space: nowrap; }
th:first-child, td:first-child, .words td { text-align: left; white-space: normal; }
img { display: block; width: 100%; height: auto; margin: 0.5rem 0; }
pre {
  padding: 1rem 1.2rem; border-radius: 6px; background: #f5f7fa; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
details { margin-top: 3rem; }
summary { cursor: pointer; font-weight: 600; }
@media print { body { padding: 0; max-width: none; } h2, img { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<h1>{name}</h1>
{body}</body>
</html>
"""


def write_report(run_dir: str | Path) -> Path:
    """Write loss.png, expert_load.png (if layers have experts) and report.html, whose path is returned."""
    folder = Path(run_dir)
    run = read_run(folder)
    plot_loss(read_rows(folder / "metrics.jsonl"), folder / "loss.png")
    if run.layers:
        plot_expert_load(run.load, run.recent, folder / "expert_load.png")
    name = html.escape(folder.resolve().name)
    page = PAGE.format(name=name, style=STYLE, body="".join(_sections(folder, run)))
    replace_file(folder / "report.html", page.encode())
    return folder / "report.html"


def summary(run_dir: str | Path) -> list[tuple[str, str]]:
    """A run's (name, value) pairs for the table on the terminal; a dash where there is no value."""
    folder = Path(run_dir)
    alarms = sum(1 for _ in read_rows(folder / ALARMS))
    told = [("Alarms", f"{alarms:,}")] if alarms else []
    return [*_summary(read_run(folder)), *told, ("Report", str(folder / "report.html"))]


def _summary(run: Run) -> list[tuple[str, str]]:
    last = run.train[-1] if run.train else {}
    validation = run.evaluated.get(ALL)
    speeds = [row["tokens_per_second"] for row in run.train if row["tokens_per_second"] is not None]
    span = f"last {run.window_steps:,} steps"
    losses = [row["loss"] for row in run.train[-run.window_steps :] if row["loss"] is not None]
    violation = deaths = dropped = NONE
    if run.layers:
        mean = statistics.fmean(load.max_vio_window for load in run.layers)
        violation = f"{mean:.3f} (mean over layers, {span})"
        num_dead = sum(load.dead_window for load in run.layers)
        deaths = f"{num_dead:,} of {sum(load.num_experts for load in run.layers):,} ({span})"
        dropped = f"{sum(load.dropped for load in run.layers):,}"
    return [
        ("Steps", f"{last['step']:,}" if last else NONE),
        ("Tokens", f"{last['tokens']:,}" if last else NONE),
        ("Training loss", f"{statistics.fmean(losses):.3f} (mean, {span})" if losses else NONE),
        ("Validation loss", _number(validation)),
        ("Perplexity", _perplexity(validation)),
        ("Tokens/s", f"{statistics.median(speeds):,.0f} (median)" if speeds else NONE),
        ("MaxVio", violation),
        ("Dead experts", deaths),
        ("Dropped tokens", dropped),
    ]


def _sections(folder: Path, run: Run) -> Iterator[str]:
    yield f"<dl>{''.join(_fact(name, value) for name, value in _summary(run))}</dl>\n"
    if alarms := list(read_rows(folder / ALARMS)):
        yield f"<h2>Alarms</h2>\n{_alarms(alarms)}"
    yield f"<h2>Loss</h2>\n{_picture(folder / 'loss.png', 'Training and validation loss')}"
    if run.evaluated:
        yield f"<h2>Validation by domain</h2>\n{_domains(run)}"
    if run.layers:
        yield f"<h2>Expert load</h2>\n{_picture(folder / 'expert_load.png', 'Expert load and MaxVio')}"
        yield f"<h2>Expert load by layer</h2>\n{_layers(run)}"
        yield f"<h2>Bytes between ranks</h2>\n{_traffic(run)}"
    if (folder / "sample.txt").exists():
        yield f"<h2>Sample</h2>\n<pre>{_text(folder / 'sample.txt')}</pre>\n"
    if (folder / "environment.json").exists():
        yield f"<h2>Environment</h2>\n{_environment(folder / 'environment.json')}"
    if (folder / "config.yaml").exists():
        text = _text(folder / "config.yaml")
        yield f"<details><summary>Configuration</summary><pre>{text}</pre></details>\n"


def _fact(name: str, value: str) -> str:
    number, _, note = value.partition(" (")
    small = f"<small>{html.escape(note.rstrip(')'))}</small>" if note else ""
    return f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(number)}{small}</dd></div>\n"


def _picture(path: Path, description: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{content}">\n'


def _domains(run: Run) -> str:
    head = ("Domain", "Loss (nats per token)", "Perplexity", "MaxVio of its tokens")
    order = sorted(run.evaluated, key=lambda domain: (domain == ALL, domain))
    return _table(
        head,
        [
            (domain, _number(loss), _perplexity(loss), _number(run.domain_max_vio.get(domain)))
            for domain, loss in ((domain, run.evaluated[domain]) for domain in order)
        ],
    )


def _alarms(rows: Sequence[Mapping[str, Any]]) -> str:
    last = [(f"step\u00a0{row['step']:,}", row["message"]) for row in rows[-MAX_ALARMS:]]
    note = f"<p>The last {MAX_ALARMS} of {len(rows):,}.</p>\n" if len(rows) > MAX_ALARMS else ""
    return note + _table(("", ""), last)


def _layers(run: Run) -> str:
    head = ("Layer", "MaxVio, last step", "MaxVio, window", "Entropy, last step")
    note = (
        f"The window is the last {run.window_steps:,} steps. MaxVio is (largest - mean) / mean: 0 is even. "
        "Entropy is a share of its maximum: 1 is even. A dead expert received no token."
    )
    rows = [
        (
            str(load.layer),
            _number(load.max_vio),
            _number(load.max_vio_window),
            f"{load.entropy:.4f}",
            f"{load.dead:,}",
            f"{load.dead_window:,}",
            f"{load.dropped:,}",
        )
        for load in run.layers
    ]
    return f"<p>{note}</p>\n" + _table((*head, "Dead, last step", "Dead, window", "Dropped, whole run"), rows)


def _traffic(run: Run) -> str:
    num_ranks = len(run.sent_bytes)
    total, local = int(run.sent_bytes.sum()), int(run.sent_bytes.trace())
    if num_ranks <= 1:
        return "<p>Every expert lives on every rank, so that no token travels.</p>\n"
    share = (total - local) / total if total else 0.0
    note = (
        f"Dispatch sent {_bytes(total - local)} to other ranks of an expert group in the forward passes of "
        f"the whole run, {share:.1%} of what it moved; combine returned as much. Rows send, columns receive."
    )
    if num_ranks > MAX_RANK_COLUMNS:
        return f"<p>{note}</p>\n"
    rows = [(f"rank {rank}", *map(_bytes, sent)) for rank, sent in enumerate(run.sent_bytes.tolist())]
    return f"<p>{note}</p>\n" + _table(("", *(f"rank {rank}" for rank in range(num_ranks))), rows)


def _environment(path: Path) -> str:
    facts = json.loads(path.read_text(encoding="utf-8"))
    return _table(("", ""), [(key, v if isinstance(v, str) else json.dumps(v)) for key, v in facts.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are escaped. Without a head the table is one of words, set flush left."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    if not any(head):
        return f'<div class="wide"><table class="words">{body}</table></div>\n'
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead>{body}</table></div>\n'


def _text(path: Path) -> str:
    return html.escape(path.read_text(encoding="utf-8"))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _perplexity(loss: float | None) -> str:
    return NONE if loss is None else f"{math.exp(min(loss, 700.0)):,.2f}"


def _bytes(count: int) -> str:
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
