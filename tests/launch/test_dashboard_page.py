"""The page in a real Chromium: live while a run writes, compared, by keyboard, and exported, offline."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch.dashboard.command import main
from launch.dashboard.server import Server
from launch.dashboard.view import RunView
from tests.browser import CHROMIUM, Browser, Page, chromium
from tests.made_run import MadeRun, make_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

HIGH = 6000  # of a window, in pixels, in which all of the page is seen: figures draw when they are
READY = "window.dashboard && dashboard.runs.length == {} && dashboard.state.frames > 0"
# How many colours the map of expert load has, and what they add up to: another picture, another sum.
PICTURE = """(() => {
  const canvas = document.querySelector("#load canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let sum = 0;
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) {
    const colour = data[i] * 65536 + data[i + 1] * 256 + data[i + 2];
    sum = (sum * 31 + colour) % 4294967291;
    colours.add(colour);
  }
  return [colours.size, sum];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[MadeRun, MadeRun]:
    """V2-Lite's shape, with the bias and without it."""
    folder = tmp_path_factory.mktemp("runs")
    shape: dict[str, Any] = dict(layers=26, experts=64, ranks=8, top_k=6, mtp=True)
    with_bias = make_run(folder / "bias", steps=24, **shape)
    with_bias.alarm("layer 7: expert 12 had no token: try a bias.", "dead_expert", layer=7, expert=12, rank=1)
    return with_bias, make_run(folder / "none", steps=24, bias=False, **shape)


@contextmanager
def served(*folders: Path) -> Iterator[str]:
    """The address of a running dashboard."""
    server = Server([RunView(folder, folder.name) for folder in folders], "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def show(page: Page, url: str, num_runs: int) -> None:
    """Open a page and wait until its figures are drawn."""
    page.resize(1280, HIGH)
    page.open(url)
    page.wait_for(READY.format(num_runs))
    page.wait_for(
        "dashboard.cell(0, 0, 0).width > 0 && document.querySelector('#timeline canvas').height > 20"
    )


@contextmanager
def opened(browser: Browser, *folders: Path) -> Iterator[Page]:
    """A page on these runs, on which nothing may fail."""
    with served(*folders) as url, browser.page() as page:
        show(page, url, len(folders))
        yield page
        assert page.errors == []
        assert all(request.startswith((url, "data:")) for request in page.requests), page.requests


def test_the_heatmap_grows_while_a_run_writes(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=3)
    with opened(browser, run.folder) as page:
        assert page.evaluate("dashboard.state.frames") == 3
        before = page.evaluate(PICTURE)
        for step in range(4, 9):
            run.advance(1)
            page.wait_for(f"dashboard.state.frames == {step}", seconds=3)
        page.wait_for(f"JSON.stringify({PICTURE}) != '{before}'.replaceAll(' ', '')")
        assert page.evaluate("document.querySelector('#position').textContent") == "8 of 8"
        assert page.evaluate("dashboard.runs[0].state") == "running"
        run.alarm("layer 2: it is uneven.", layer=2)
        run.advance(1)
        page.wait_for("document.querySelector('#alarms li')?.textContent.includes('it is uneven')", seconds=3)
        run.rewind(5)  # as a resume from a checkpoint does
        run.advance(1)
        page.wait_for("dashboard.state.frames == 6", seconds=3)
        assert page.evaluate("document.querySelector('#alarms li')") is None


def test_slider_layers_and_keyboard(browser: Browser, runs: tuple[MadeRun, MadeRun]) -> None:
    with opened(browser, runs[0].folder) as page:
        newest = page.evaluate(PICTURE)
        page.evaluate("document.querySelector('#step').focus()")
        page.press("Home")
        page.wait_for("dashboard.state.frame == 0 && dashboard.state.step == 1")
        page.wait_for(f"{PICTURE}[1] != {newest[1]}")
        page.press("ArrowRight", times=3)
        page.wait_for("dashboard.state.step == 4")
        page.press("End")
        page.wait_for("dashboard.state.step === null && dashboard.state.frame == 23")
        cell = page.evaluate("dashboard.cell(0, 5, 17)")
        page.click("#load canvas", cell["x"] + cell["width"] / 2, cell["y"] + cell["height"] / 2)
        page.wait_for("dashboard.state.layer == 5 && dashboard.state.expert == 17")
        said = page.evaluate("document.querySelector('#load output').textContent")
        assert "layer 6, expert 17 on rank 2" in said and "of assignments" in said and "bias" in said
        page.press("ArrowDown")
        page.press("ArrowLeft", times=2)
        page.wait_for("dashboard.state.layer == 6 && dashboard.state.expert == 15")
        page.evaluate(
            "(s => { s.value = 26; s.dispatchEvent(new Event('change')) })(document.querySelector('#layer'))"
        )
        page.wait_for("document.querySelector('#history output').textContent.includes('layer mtp0')")
        page.click("#alarms li button, #alarms li a, #alarms li")
        page.wait_for("dashboard.state.layer == 6")


def test_two_runs_side_by_side(browser: Browser, runs: tuple[MadeRun, MadeRun]) -> None:
    with opened(browser, *(run.folder for run in runs)) as page:
        assert page.evaluate("document.querySelector('#comparison').hidden") is False
        page.evaluate(
            "(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.querySelector('#second'))"
        )
        page.wait_for("dashboard.state.second == 1")
        titles = (
            "[...document.querySelectorAll('#load h3')].filter(e => e.offsetParent).map(e => e.textContent)"
        )
        page.wait_for(f"{titles}.every(Boolean)")
        first, second = page.evaluate(titles)
        assert "bias, step" in first and "none, step" in second
        assert page.evaluate("dashboard.cell(1, 0, 63).width") >= 4


@pytest.mark.parametrize(("layers", "experts", "ranks"), [(27, 64, 8), (61, 256, 16)])
def test_every_expert_has_pixels_of_its_own(
    browser: Browser, tmp_path: Path, layers: int, experts: int, ranks: int
) -> None:
    run = make_run(tmp_path / "r", layers=layers, experts=experts, ranks=ranks, top_k=8, steps=2, pairs=False)
    with opened(browser, run.folder) as page:
        cells = page.evaluate(
            f"Array.from({{length: {experts}}}, (_, e) => dashboard.cell(0, {layers - 1}, e))"
        )
        columns = sorted((cell["x"], cell["x"] + cell["width"]) for cell in cells)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(columns))
        assert all(cell["width"] >= 3 and cell["height"] >= 8 for cell in cells)
        assert page.evaluate(PICTURE)[0] > 50


def test_the_export_opens_with_no_network(
    browser: Browser, runs: tuple[MadeRun, MadeRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.html"
    assert main([*(str(run.folder) for run in runs), "--export", str(out)]) == 0
    with served(*(run.folder for run in runs)) as url, browser.page() as page:
        show(page, url, 2)
        live = page.evaluate(PICTURE)
    with browser.page() as page:
        page.offline()
        show(page, out.as_uri(), 2)
        page.wait_for(f"{PICTURE}[1] == {live[1]}")  # the same figure, pixel by pixel
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure')].filter(f => f.querySelector('canvas')).length"
        )
        assert drawn >= 10
        assert page.errors == []
        assert {request.partition(":")[0] for request in page.requests} <= {"file", "data", "blob"}
