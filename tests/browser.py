"""Drives a headless Chromium by its DevTools protocol, over one WebSocket per tab and without threads.

Events that Chromium sends meanwhile (requests, console messages, exceptions) are taken in while the answer
to a call is awaited: `Page.errors` and `Page.requests` hold them up to the last call.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",  # containers run as root
    "--no-first-run",
    "--no-proxy-server",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
    "Escape": 27,
}
SECONDS = 20.0  # that anything may take on a busy machine
_local = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Page:
    """A tab."""

    def __init__(self, address: str) -> None:
        self._socket: WebSocket = create_connection(
            address, timeout=SECONDS, suppress_origin=True, http_no_proxy=["127.0.0.1"]
        )
        self._calls = 0
        self._loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(1280, 900)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._calls:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            self._take(message)

    def _take(self, event: dict[str, Any]) -> None:
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(argument.get("value")) for argument in told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Go to a page, and wait until it has loaded."""
        self._loaded = False
        self.call("Page.navigate", url=url)
        end = time.monotonic() + SECONDS
        while not self._loaded:
            assert time.monotonic() < end, f"{url} was not loaded"
            self._take(json.loads(self._socket.recv()))

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value, promises awaited, by way of JSON."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = SECONDS) -> Any:
        """The expression's first value that is true; AssertionError after so many seconds."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(f"(() => {{ try {{ return {expression} }} catch {{}} }})()")):
            assert time.monotonic() < end, (f"never true: {expression}", self.errors)
            time.sleep(0.05)
        return value

    def click(self, selector: str, x: float | None = None, y: float | None = None) -> None:
        """A real click into an element: at (x, y) of it in CSS px, else into its middle."""
        left, top, width, height = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            " return [r.left, r.top, r.width, r.height] })()"
        )
        at = {"x": left + (width / 2 if x is None else x), "y": top + (height / 2 if y is None else y)}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, which the focused element gets."""
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                code = {"windowsVirtualKeyCode": KEYS[key], "code": key}
                self.call("Input.dispatchKeyEvent", type=kind, key=key, **code)

    def offline(self) -> None:
        """Take the network away."""
        self.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the window's size in CSS px, and how many screen pixels make one."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def screenshot(self, path: Path, *selectors: str) -> None:
        """Write elements (none: the page) as one PNG; meanwhile the window is so high that all is drawn."""
        size = self.call("Page.getLayoutMetrics")["cssLayoutViewport"]
        height = self.evaluate("document.documentElement.scrollHeight")
        self.resize(size["clientWidth"], height)
        self.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(() => done(1)), 300))")
        wanted = ", ".join(selectors or ["body"])
        box = self.evaluate(
            f"(() => {{ const boxes = [...document.querySelectorAll({json.dumps(wanted)})]"
            ".map(e => e.getBoundingClientRect());"
            " const [x, y] = [Math.min(...boxes.map(b => b.left)), Math.min(...boxes.map(b => b.top))];"
            " return {x, y, width: Math.max(...boxes.map(b => b.right)) - x,"
            " height: Math.max(...boxes.map(b => b.bottom)) - y} })()"
        )
        shot = self.call("Page.captureScreenshot", clip={**box, "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))
        self.resize(size["clientWidth"], size["clientHeight"])

    def close(self) -> None:
        """Leave the tab to the browser's end."""
        self._socket.close()


class Browser:
    """A running Chromium with a fresh profile; `chromium()` starts and ends it."""

    def __init__(self, port: int) -> None:
        self._port = port

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A new tab, which is closed at the end."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new", method="PUT")
        with _local.open(request, timeout=SECONDS) as answer:
            target = json.load(answer)
        page = Page(target["webSocketDebuggerUrl"])
        try:
            yield page
        finally:
            page.close()
            _local.open(f"http://127.0.0.1:{self._port}/json/close/{target['id']}", timeout=SECONDS).close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, of which no process is left at the end."""
    assert CHROMIUM, "chromium is not installed"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its children end with it
        )
        try:
            yield Browser(_port(Path(profile) / "DevToolsActivePort", process))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _port(announced: Path, process: "subprocess.Popen[bytes]") -> int:
    """The port that Chromium chose, as soon as it listens."""
    end = time.monotonic() + SECONDS
    while not (announced.exists() and announced.read_text().count("\n")):
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        assert time.monotonic() < end, "chromium did not start"
        time.sleep(0.05)
    return int(announced.read_text().split()[0])
