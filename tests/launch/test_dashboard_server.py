"""The server as a browser or Prometheus meets it: real HTTP on loopback, while a thread writes the run."""

import http.client
import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from launch.dashboard.export import page
from launch.dashboard.server import Server
from launch.dashboard.view import RunView
from moe.telemetry.rows import read_rows
from parallel.errors import UserError
from tests.made_run import MadeRun, make_run

Answer = tuple[int, str, str]  # status, kind, content


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("first"), layers=2, steps=4)


@pytest.fixture(scope="module")
def server(run: MadeRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    other = make_run(tmp_path_factory.mktemp("second"), layers=2, steps=2, bias=False)
    views = [RunView(run.folder, 'a "quoted" name'), RunView(other.folder, "second")]
    with Server(views, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
    thread.join()


def get(server: Server, path: str, host: str | None = None, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    with connection.getresponse() as response:
        answer = response.status, response.getheader("Content-Type") or "", response.read().decode()
    connection.close()
    return answer


def test_the_page_is_that_of_the_export(server: Server) -> None:
    status, kind, content = get(server, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert content.encode() == page() and ">null</script>" in content


def test_runs_and_views(server: Server, run: MadeRun) -> None:
    runs = json.loads(get(server, "/runs")[2])
    assert [(row["name"], row["index"]) for row in runs] == [('a "quoted" name', 0), ("second", 1)]
    assert {row["state"] for row in runs} == {"running"}
    whole = json.loads(get(server, "/view/0")[2])
    assert whole["frames"]["step"] == list(range(1, run.step + 1)) and not whole["partial"]
    part = json.loads(get(server, f"/view/0?after=3&epoch={whole['epoch']}")[2])
    assert part["frames"]["step"][0] == 4 and part["partial"]
    assert not json.loads(get(server, f"/view/0?after=3&epoch={whole['epoch'] + 1}")[2])["partial"]
    assert json.loads(get(server, "/view/1")[2])["name"] == "second"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *[("/view/2", 404), ("/view/-1", 404), ("/view/x", 404), ("/view/0?after=x", 400)],
        *[
            ("/page.html", 404),
            ("/../config.yaml", 404),
            ("//etc/passwd", 404),
            ("//[", 404),
            ("/launch/", 404),
        ],
    ],
)
def test_nothing_else_is_there(server: Server, path: str, status: int) -> None:
    assert get(server, path)[0] == status


def test_nothing_can_be_written(server: Server) -> None:
    assert {get(server, "/runs", method=method)[0] for method in ("POST", "PUT", "DELETE")} == {501}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[("localhost:9999", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("127.1.2.3:80", 200)],
        *[("evil.example", 403), ("evil.example:8765", 403), ("localhost.evil.example", 403), ("", 403)],
        *[("10.0.0.1", 403), ("127.0.0.1.nip.io", 403), ("[bad", 403)],
    ],
)
def test_foreign_names_are_refused(server: Server, host: str, status: int) -> None:
    """Else a page on the web could read runs by a name of its own that leads to 127.0.0.1."""
    for path in ("/", "/runs", "/view/0", "/metrics", "/events") if status != 200 else ("/runs",):
        assert get(server, path, host)[0] == status


def test_on_all_addresses_any_name_is_answered(run: MadeRun) -> None:
    with Server([RunView(run.folder, "mine")], "0.0.0.0", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        assert get(server, "/runs", "cluster.example")[0] == 200
        assert server.url == f"http://127.0.0.1:{server.port}/"
        server.shutdown()
    thread.join()


def test_new_rows_are_there_within_two_seconds(server: Server, run: MadeRun) -> None:
    """From the moment that a step is written until a client that was told of it has its frame."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/events")
    stream = connection.getresponse()
    assert stream.getheader("Content-Type") == "text/event-stream"
    written: dict[int, float] = {}
    begin = run.step
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.3):
            run.advance(1)
            written[run.step] = time.monotonic()

    writer = threading.Thread(target=write)
    writer.start()
    shown: dict[int, float] = {}
    moments = []
    while len(shown) < 5:
        line = stream.readline().decode()
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if event["index"] == 0 and event["step"] > begin:
            moments.append(time.monotonic())
            part = json.loads(get(server, f"/view/0?after={begin}&epoch={event['epoch']}")[2])
            for step in part["frames"]["step"]:
                shown.setdefault(step, time.monotonic())
    stop.set()
    writer.join()
    connection.close()
    latency = [at - written[step] for step, at in shown.items() if step in written]
    assert len(latency) >= 4 and max(latency) < 2.0, latency
    assert len(moments) < 2 or min(b - a for a, b in itertools.pairwise(moments)) > 0.8


def test_a_listener_is_let_go_when_the_server_ends(run: MadeRun) -> None:
    with Server([RunView(run.folder, "mine")], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request("GET", "/events")
        stream = connection.getresponse()
        assert stream.readline().startswith(b"data: ")
        server.shutdown()
    thread.join()
    assert stream.read().strip() == b""  # the end of the stream, not a timeout
    connection.close()


def test_gauges_are_those_of_the_newest_step(server: Server, run: MadeRun) -> None:
    time.sleep(0.6)  # the server may have looked half a second ago
    status, kind, text = get(server, "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    rows = [row for row in read_rows(run.folder / "expert_load.jsonl") if row["step"] == run.step]
    assert len(rows) == 2 and len(lines) == 2 * (2 * 2 * 16 + 1)
    for row in rows:
        for expert, count in enumerate(row["counts"]):
            labels = f'{{run="a \\"quoted\\" name",layer="{row["layer"]}",expert="{expert}"}}'
            load = float(lines[f"switchyard_expert_load{labels}"])
            assert load == pytest.approx(16 * count / sum(row["counts"]), rel=1e-5)
            assert float(lines[f"switchyard_expert_bias{labels}"]) == pytest.approx(
                row["bias"][expert], abs=1e-6
            )
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: the text was not checked by Prometheus")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0 and checked.stderr == "", checked.stderr


def test_addresses_that_cannot_be_had(server: Server) -> None:
    with pytest.raises(UserError, match=rf"`--port` must be free, but {server.port} is in use: "):
        Server([], "127.0.0.1", server.port)
    for host in ("203.0.113.7", "no.such.host.invalid"):
        with pytest.raises(
            UserError, match=rf"`--host` must be an address of this machine, but {host} is not"
        ):
            Server([], host, 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6() -> None:
    with Server([], "::1", 0) as server:
        assert server.url == f"http://[::1]:{server.port}/" and server.is_local
