"""Serves the page and what it draws, on loopback, by plain HTTP and server-sent events. No torch.

    GET /                        the page
    GET /runs                    [{"name", "index", "state"}]
    GET /view/0[?after=&epoch=]  a run, whole or only what came after a step (view.py)
    GET /events                  a stream of {"index", "epoch", "step", ...} whenever a run has changed
    GET /metrics                 each expert's newest load and bias for Prometheus, which so burdens this
                                 process and not the one that trains

Nothing is written and no path is ever a file's. A browser can be led by a foreign page to send requests to
its own loopback under that page's name (DNS rebinding), so there the Host header must be a local one. Runs
are looked at only while somebody asks or listens.
"""

import contextlib
import errno
import ipaddress
import json
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from launch.dashboard.export import page
from launch.dashboard.gauges import gauges
from launch.dashboard.view import RunView, as_json
from parallel.errors import UserError

POLL_S = 0.5  # a run is looked at no more often
EVENTS_S = 1.0  # between two events to a listener, at least
ALIVE_S = 15.0  # a silent listener is told something, so that one that left is noticed


class Server(socketserver.ThreadingTCPServer):
    """Listens from its construction on; `serve_forever` answers. Raises UserError where it cannot listen."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, views: Sequence[RunView], host: str, port: int) -> None:
        self.page = page()
        self.views = views
        self.stopping = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._polled = [0.0] * len(views)
        self._polling = [threading.Lock() for _ in views]
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(_refusal(host, port, error)) from None
        self.is_local = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Where the page is; of all addresses of this machine, the one that it has for itself."""
        host = str(self.server_address[0])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{self.port}/" if ":" in host else f"http://{host}:{self.port}/"

    @property
    def port(self) -> int:
        """The one that was asked for, or for 0 the free one that was found."""
        return int(self.server_address[1])

    def fresh(self, index: int) -> RunView:
        """A run, after a look at its files if the last one was a while ago."""
        with self._polling[index]:
            if time.monotonic() - self._polled[index] >= POLL_S:
                self.views[index].poll()
                self._polled[index] = time.monotonic()
        return self.views[index]

    def server_close(self) -> None:
        """Stop listening, and let go of listeners."""
        self.stopping.set()
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "switchyard", ""
    timeout = 60  # of an idle connection, and of a listener that takes nothing

    def handle(self) -> None:
        """Answer until the other side leaves, at whatever moment."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer a request."""
        if self.server.is_local and not _is_local(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.FORBIDDEN, "this page answers to local names only: use 127.0.0.1")
            return
        path, _, query = self.path.partition("?")
        match path.split("/")[1:]:
            case [""]:
                self._answer(self.server.page, "text/html; charset=utf-8")
            case ["runs"]:
                self._answer(as_json(self._runs()), "application/json")
            case ["view", index] if index.isdecimal() and int(index) < len(self.server.views):
                self._view(int(index), parse_qs(query))
            case ["events"]:
                self._events()
            case ["metrics"]:
                found = [self.server.fresh(index) for index in range(len(self.server.views))]
                self._answer(gauges(found).encode(), "text/plain; version=0.0.4; charset=utf-8")
            case _:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here: see /")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal is the user's."""

    def _runs(self) -> list[dict[str, object]]:
        runs = [self.server.fresh(index) for index in range(len(self.server.views))]
        return [{"name": run.name, "index": i, "state": run.mark()["state"]} for i, run in enumerate(runs)]

    def _view(self, index: int, query: dict[str, list[str]]) -> None:
        try:
            after, epoch = (int(query[key][0]) if key in query else None for key in ("after", "epoch"))
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "`after` and `epoch` must be whole numbers")
            return
        self._answer(as_json(self.server.fresh(index).view(after, epoch)), "application/json")

    def _events(self) -> None:
        """Tell of each run once, then whenever it has changed, until the listener or the server leaves."""
        self._head(HTTPStatus.OK, "text/event-stream", {"Connection": "close"})
        self.close_connection = True
        told: dict[int, dict[str, object]] = {}
        spoken = time.monotonic()
        while not self.server.stopping.is_set():
            lines = []
            for index in range(len(self.server.views)):
                mark = self.server.fresh(index).mark()
                if told.get(index) != mark:
                    told[index] = mark
                    lines.append(f"data: {json.dumps({'index': index, **mark})}\n\n")
            if not lines and time.monotonic() - spoken > ALIVE_S:
                lines.append(": nothing new\n\n")
            if lines:
                self.wfile.write("".join(lines).encode())
                spoken = time.monotonic()
            self.server.stopping.wait(EVENTS_S if lines else POLL_S)

    def _answer(self, content: bytes, kind: str) -> None:
        self._head(HTTPStatus.OK, kind, {"Content-Length": str(len(content))})
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        content = f"{sentence}\n".encode()
        self._head(status, "text/plain; charset=utf-8", {"Content-Length": str(len(content))})
        self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, more: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own says the rest
        }
        for name, value in (fixed | more).items():
            self.send_header(name, value)
        self.end_headers()


def _is_local(host: str) -> bool:
    """Whether a Host header, with any port, names this machine to itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"`--port` must be free, but {port} is in use: choose another, or 0 for any"
    if error.errno == errno.EACCES:
        return f"`--port` must be one that you may listen on, but {port} is not: use 1024 or more"
    return f"`--host` must be an address of this machine, but {host} is not: leave it out for loopback"
