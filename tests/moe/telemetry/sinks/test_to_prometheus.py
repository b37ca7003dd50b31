"""The endpoint, what the shipped Grafana dashboard asks, and a real Prometheus between the two."""

import itertools
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.moe.telemetry.sinks.told import ALARM, EVALUATION, loads, metrics, outlets

client = pytest.importorskip("prometheus_client")
sdk = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: E402
from grafana_foundation_sdk.cog.plugins import register_default_plugins  # noqa: E402
from grafana_foundation_sdk.models.prometheus import Dataquery  # noqa: E402

from tests.moe.telemetry.sinks.grafana_dashboard import FILE, make  # noqa: E402

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="Prometheus is not installed")
SHIPPED = json.loads(FILE.read_text())
NAMED = ("run", "layer", "kind", "link", "domain", "expert")
PANELS = {panel["title"]: panel for panel in SHIPPED["panels"] if panel["type"] != "row"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(value: Callable[[], Any], seconds: float = 15) -> Any:
    """The first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := value():
                return found
        except OSError:
            pass
        time.sleep(0.05)
    raise TimeoutError


def scraped(port: int) -> dict[str, float]:
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return {name: float(value) for name, value in lines if "_created" not in name}


def asked(panel: str, target: int = 0, rate: str = "1m") -> str:
    """A panel's query as Grafana would send it for layer 1 of every run."""
    query = PANELS[panel]["targets"][target]["expr"]
    for name, value in (("$__rate_interval", rate), ("$run", ".+"), ("$layer", "1")):
        query = query.replace(name, value)
    assert "$" not in query.replace('"0$1"', "")
    return query


def test_the_endpoint_answers_with_the_last_step(tmp_path: Path) -> None:
    port, run = free_port(), tmp_path / "probe"
    sinks = outlets(run, "prometheus", port=port)
    for step in (1, 2, 3, 2):  # the last as after a resume
        sinks.step(metrics(step), loads(step))
    sinks.evaluation(EVALUATION)
    sinks.alarm(ALARM)
    sinks.alarm(ALARM)
    alarms = 'switchyard_alarms_total{kind="dead_expert",run="probe"}'
    found = until(lambda: (page := scraped(port)).get(alarms) == 2 and page)
    sinks.close()
    assert found['switchyard_train_loss{run="probe"}'] == 0.5
    assert found['switchyard_layer_max_vio{layer="mtp0",run="probe"}'] == 2.25
    assert found['switchyard_layer_rank_share{layer="2",run="probe"}'] == 1.5
    assert found['switchyard_eval_loss{domain="wiki?en",run="probe"}'] == 1.5
    assert found['switchyard_tokens_total{run="probe"}'] == 4 * 16
    assert found['switchyard_dropped_total{layer="1",run="probe"}'] == 4 * 3
    assert found['switchyard_link_bytes_total{link="network",run="probe"}'] == 4 * 60
    assert not any("mfu" in name or "switchyard_expert_" in name for name in found)
    with pytest.raises(OSError):
        scraped(port)


def test_a_port_in_use_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sinks = outlets(tmp_path, "prometheus", port=port)
        sinks.step(metrics(1), loads(1))
        sinks.close()
    assert len(caplog.records) == 1
    assert f"cannot listen on 127.0.0.1:{port}, Address already in use: set `telemetry.port`" in caplog.text


def test_the_shipped_dashboard_is_fresh_and_grafana_can_read_it() -> None:
    assert FILE.read_text() == make(), "run `python -m tests.moe.telemetry.sinks.grafana_dashboard`"
    register_default_plugins()
    assert reread(SHIPPED) == SHIPPED
    board = sdk.Dashboard.from_json(SHIPPED)
    targets = [target for panel in board.panels for target in getattr(panel, "targets", None) or []]
    assert {type(target) for target in targets} == {Dataquery}
    assert [variable.name for variable in board.templating.list_val] == ["datasource", "run", "layer"]
    misspelt = json.loads(json.dumps(SHIPPED).replace('"legendFormat"', '"legend_format"'))
    assert reread(misspelt) != misspelt


def reread(board: dict[str, Any]) -> dict[str, Any]:
    """What Grafana's own types understand of a dashboard."""
    return json.loads(json.dumps(sdk.Dashboard.from_json(board), cls=JSONEncoder))


@needs_promtool
def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    queries = [asked(name, n) for name, panel in PANELS.items() for n in range(len(panel["targets"]))]
    rules = [{"record": f"query_{n}", "expr": query} for n, query in enumerate(queries)]
    for broken in ([], [{"record": "broken", "expr": "sum by (run"}]):
        path = tmp_path / "rules.yml"
        path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules + broken}]}))
        checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
        assert (checked.returncode == 0) == (not broken), checked.stderr


@contextmanager
def prometheus(folder: Path, *targets: int) -> Iterator[int]:
    """A server of its own that scrapes ports of this machine five times a second."""
    port = free_port()
    config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}}
    places = [{"targets": [f"127.0.0.1:{target}" for target in targets]}]
    config["scrape_configs"] = [{"job_name": "runs", "static_configs": places}]
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/store"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        until(lambda: urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5).status == 200)
        yield port
    finally:
        server.terminate()
        server.wait(10)


class Answers:
    """What the server answers to a query, by labels; at `at`, or now."""

    def __init__(self, port: int) -> None:
        self.port, self.at = port, 0.0

    def __call__(self, query: str) -> dict[str, float]:
        at = self.at or time.time()
        ask = urlencode({"query": query, "start": at, "end": at, "step": 1})
        page = urlopen(f"http://127.0.0.1:{self.port}/api/v1/query_range?{ask}", timeout=5).read()
        found = json.loads(page)["data"]["result"]
        labels = [sorted(one["metric"].items()) for one in found]
        names = [" ".join(value for key, value in one if key in NAMED) for one in labels]
        return dict(zip(names, (float(one["values"][0][1]) for one in found), strict=True))


@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_prometheus_scrapes_a_run_and_answers_the_dashboard(tmp_path: Path) -> None:
    experts = client.CollectorRegistry()  # as the dashboard's process would answer
    load = client.Gauge("switchyard_expert_load", "", ["run", "layer", "expert"], registry=experts)
    for expert in range(101):
        load.labels("probe", 1, expert).set(expert)
    side_port, port, run = free_port(), free_port(), tmp_path / "probe"
    side, _ = client.start_http_server(side_port, "127.0.0.1", experts)
    sinks = outlets(run, "prometheus", port=port)
    sinks.evaluation(EVALUATION)
    sinks.alarm(ALARM)
    try:
        with prometheus(tmp_path, port, side_port) as server:
            answer, steps = Answers(server), itertools.count(1)

            def goes_on() -> dict[str, float]:
                """Train until there is a rate; the server's first scrape comes after 5 seconds."""
                step = next(steps)
                sinks.step(metrics(step, mfu=0.25), loads(step))
                return answer(asked("Dropped by layer", rate="10s"))

            until(goes_on)
            sinks.step(metrics(1000, mfu=0.25), loads(1000))
            until(lambda: answer(asked("Loss")) == {"probe": 0.001})
            answer.at = time.time()
            assert answer(asked("Loss", 1)) == {"wiki?en probe": 1.5}
            assert answer(asked("Tokens per second")) == {"probe": 64}
            assert answer(asked("MFU")) == {"probe": 0.25}
            assert answer(asked("Alarms")) == {"dead_expert probe": 1}
            assert answer(asked("MaxVio by layer, over the window")) == {
                "1 probe": 0,
                "2 probe": 2,
                "mtp0 probe": 4,
            }
            assert answer(asked("Bias spread by layer")) == dict.fromkeys(
                ("1 probe", "2 probe", "mtp0 probe"), 1
            )
            assert answer(asked("Dead experts by layer")) == {"1 probe": 1, "2 probe": 0, "mtp0 probe": 3}
            assert answer(asked("Busiest rank by layer"))["mtp0 probe"] == 1.5
            dropped = answer(asked("Dropped by layer", rate="10s"))
            moved = answer(asked("Traffic by link", rate="10s"))
            assert set(dropped) == {"1 probe", "2 probe", "mtp0 probe"} and dropped["1 probe"] > 0
            assert moved["kept probe"] == pytest.approx(80 * dropped["1 probe"])  # 240 bytes, 3 drops a step
            assert moved["network probe"] == pytest.approx(moved["kept probe"] / 4)
            loads_of_experts = answer(asked("Load of experts, layer $layer, $run"))
            assert list(loads_of_experts.values()) == list(range(101))  # in the order of experts
    finally:
        sinks.close()
        side.shutdown()
        side.server_close()
