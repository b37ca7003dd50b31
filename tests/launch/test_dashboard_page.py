"""The dashboard's page in a real browser: live while a run is written, compared, exported, by keyboard."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.dashboard.export import write_export
from launch.dashboard.server import Server
from launch.dashboard.view import RunView
from moe.telemetry.rows import JsonLines, read_rows
from tests.browser import CHROMIUM, Browser, Page, chromium
from tests.made_run import MadeRun, make_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

LOAD, HISTORY = "#load .pair > div:nth-child(1) canvas", "#history canvas"
BESIDE = "#load .pair > div:nth-child(2) canvas"
COLD = 0.97  # of the mean: below it a cell is blue, above its inverse red


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab in which nothing may fail."""
    with browser.page() as tab:
        yield tab
        tab.evaluate("1")  # takes in what was said last
        assert tab.errors == []


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return make_run(tmp_path / "even", layers=4, experts=16, steps=8, mtp=True)


@contextmanager
def serving(*runs: MadeRun, port: int = 0) -> Iterator[Server]:
    with Server([RunView(run.folder, run.folder.name) for run in runs], "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def opened(page: Page, url: str, runs: int = 1) -> None:
    page.open(url)
    page.wait_for(f"dashboard.runs.length == {runs}")
    show(page, LOAD)


def show(page: Page, selector: str) -> None:
    """Scroll there, and wait until it is painted: figures that nobody sees are not."""
    canvas = f"document.querySelector({selector!r})"
    page.evaluate(f"{canvas}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    page.wait_for(f"{canvas}.closest('figure').figure.drawn")


def frames(page: Page) -> int:
    return int(page.evaluate("dashboard.state.frames"))


def state(page: Page, name: str) -> Any:
    return page.evaluate(f"dashboard.state.{name}")


def painted(page: Page, selector: str, what: str) -> str:
    """Of an element, once everything that waits has been painted."""
    wait = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    return str(page.evaluate(f"{wait}.then(() => document.querySelector({selector!r}).{what})"))


def words(page: Page, selector: str) -> str:
    return painted(page, selector, "textContent")


def picture(page: Page, selector: str) -> str:
    return painted(page, selector, "toDataURL()")


def choose(page: Page, selector: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const list = document.querySelector({selector!r}); list.value = {value!r};"
        " list.dispatchEvent(new Event('change')) })()"
    )


def cells(page: Page, layer: int, experts: int) -> Any:
    """[x, width, red, green, blue] of each expert's cell of a layer, in pixels of the canvas."""
    return page.evaluate(
        f"(() => {{ const context = document.querySelector({LOAD!r}).getContext('2d');"
        f" return Array.from({{length: {experts}}}, (_, expert) => {{"
        f" const {{ x, y, width, height }} = dashboard.cell(0, {layer}, expert);"
        " const at = context.getImageData(x + width / 2, y + height / 2, 1, 1).data;"
        " return [x, width, at[0], at[1], at[2]] }) })()"
    )


def test_the_heatmap_grows_while_the_run_is_written(page: Page, run: MadeRun) -> None:
    with serving(run) as server:
        opened(page, server.url)
        assert (frames(page), words(page, "#position")) == (8, "8 of 8")
        first = picture(page, LOAD)
        show(page, HISTORY)
        past = picture(page, HISTORY)
        run.advance(3)
        page.wait_for("dashboard.state.frames == 11", seconds=5)
        assert words(page, "#position") == "11 of 11" and "step 11" in words(page, "#state")
        assert picture(page, HISTORY) != past
        show(page, LOAD)
        assert picture(page, LOAD) != first


def test_a_resumed_run_and_what_comes_twice(page: Page, run: MadeRun) -> None:
    run.alarm()
    run.advance(1)
    with serving(run) as server:
        opened(page, server.url)
        taken = page.evaluate(
            "(async () => { const view = await json('view/0'); const run = new Run(0);"
            " run.take(view); run.take({ ...view, partial: true });"
            " return [run.steps, run.rows.get('load'), run.metrics.step, run.metrics.loss, run.alarms]"
            ".map(rows => rows.length) })()"
        )
        assert taken == [9, 9, 9, 9, 1]
        run.rewind(5)
        page.wait_for("dashboard.state.frames == 5")
        assert words(page, "#position") == "5 of 5" and words(page, "#alarms ol") == ""


def test_the_slider_sticks_to_the_newest_unless_it_was_moved(page: Page, run: MadeRun) -> None:
    with serving(run) as server:
        opened(page, server.url)
        newest = picture(page, LOAD)
        page.evaluate("document.getElementById('step').focus()")
        page.press("ArrowLeft", 3)
        assert (state(page, "step"), words(page, "#position")) == (5, "5 of 8")
        assert picture(page, LOAD) != newest
        run.advance(1)
        page.wait_for("dashboard.state.frames == 9")
        assert words(page, "#position") == "5 of 9"
        page.press("End")
        assert state(page, "step") is None
        run.advance(1)
        page.wait_for("dashboard.state.frames == 10")
        assert words(page, "#position") == "10 of 10"
        page.click("#play")
        page.wait_for("dashboard.state.playing && dashboard.state.frame < 5")
        page.wait_for("!dashboard.state.playing && dashboard.state.step === null")


def test_a_layer_is_chosen_by_click_by_keys_and_by_name(page: Page, run: MadeRun) -> None:
    with serving(run) as server:
        opened(page, server.url)
        show(page, HISTORY)
        before = picture(page, HISTORY)
        cell = page.evaluate("dashboard.cell(0, 1, 5)")
        page.click(LOAD, cell["x"] + cell["width"] / 2, cell["y"] + cell["height"] / 2)
        assert (state(page, "layer"), state(page, "expert")) == (1, 5)
        assert "layer 2, expert 5 on rank 1" in words(page, "#load .readout")
        page.press("ArrowDown")
        page.press("ArrowRight", 2)
        assert (state(page, "layer"), state(page, "expert")) == (2, 7)
        page.press("Escape")
        page.press("Home")
        page.press("ArrowUp")  # there is none above
        assert (state(page, "layer"), state(page, "expert")) == (0, None)
        choose(page, "#layer", "4")
        assert state(page, "layer") == 4 and "layer mtp0" in words(page, "#load .readout")
        show(page, HISTORY)
        assert picture(page, HISTORY) != before and "layer mtp0" in words(page, "#history output")


def test_an_alarm_leads_to_its_step_and_layer(page: Page, run: MadeRun) -> None:
    run.alarm("Expert 3 <b>starves</b>: raise balance.bias_rate.", "dead_expert", layer=2, expert=3)
    run.advance(2)
    with serving(run) as server:
        opened(page, server.url)
        assert "Dead expertstep 8Expert 3 <b>starves</b>" in words(page, "#alarms ol")
        page.click("#alarms button")
        assert [state(page, name) for name in ("step", "layer", "expert")] == [8, 1, 3]


def test_two_runs_are_drawn_over_and_beside_each_other(page: Page, run: MadeRun, tmp_path: Path) -> None:
    other = make_run(tmp_path / "skewed", layers=4, experts=16, steps=20, bias=False, mtp=True)
    with serving(run, other) as server:
        opened(page, server.url, runs=2)
        assert page.evaluate("document.querySelectorAll('#comparison tbody tr').length") == 2
        assert page.evaluate(f"document.querySelector({BESIDE!r}).checkVisibility()") is False
        choose(page, "#second", "1")
        show(page, BESIDE)
        assert picture(page, BESIDE) != picture(page, LOAD)
        titles = [words(page, f"#load .pair > div:nth-child({side}) h3") for side in (1, 2)]
        assert titles == ["even, step 8", "skewed, step 8"]  # the second has more, but is asked for the same
        show(page, "#loss canvas")
        assert all(f"{name} " in words(page, "#loss output") for name in ("even", "skewed"))
        page.click("#comparison tbody tr:nth-child(2) button")
        assert (state(page, "first"), state(page, "second")) == (1, 0)
        assert words(page, "#state").startswith("skewed")  # and so all that is said of the run above
        choose(page, "#second", "")
        assert words(page, "#position") == "20 of 20"


def test_the_exported_file_shows_the_same_without_a_network(page: Page, run: MadeRun, tmp_path: Path) -> None:
    other = make_run(tmp_path / "skewed", layers=4, experts=16, steps=8, bias=False, mtp=True)
    with serving(run, other) as server:
        opened(page, server.url, runs=2)
        figures = [LOAD, HISTORY, "#loss canvas", "#layers canvas", "#traffic canvas", "#domains canvas"]
        live = {figure: (show(page, figure), picture(page, figure))[1] for figure in figures}
        tables = [words(page, table) for table in ("#comparison table", "#preferred table", "#pairs table")]
    exported = tmp_path / "both.html"
    write_export(exported, [RunView(one.folder, one.folder.name).view() for one in (run, other)])
    page.offline()
    page.errors.clear()  # of the server that ended
    page.requests.clear()
    opened(page, exported.as_uri(), runs=2)
    for figure in figures:
        show(page, figure)
        assert picture(page, figure) == live[figure], figure
    assert [
        words(page, table) for table in ("#comparison table", "#preferred table", "#pairs table")
    ] == tables
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data", "blob"}


@pytest.mark.parametrize(("layers", "experts", "ranks"), [(27, 64, 8), (61, 256, 16)])
def test_every_expert_has_a_column_of_its_own(
    page: Page, tmp_path: Path, layers: int, experts: int, ranks: int
) -> None:
    made = make_run(
        tmp_path / "large", layers=layers, experts=experts, ranks=ranks, steps=2, pairs=False, tokens=512
    )
    rows = [row for row in read_rows(made.folder / "expert_load.jsonl") if row["step"] == 2]
    with serving(made) as server:
        opened(page, server.url)
        for layer in (0, layers - 1):
            counts = np.array(rows[layer]["counts"])
            load = counts / counts.mean()
            x, width, red, green, blue = np.array(cells(page, layer, experts)).T
            assert width.min() >= 1 and (np.diff(x) >= width[:-1]).all()
            assert (red[load > 1 / COLD] > blue[load > 1 / COLD]).all()
            cold = (load < COLD) & (load > 0)
            assert (red[cold] < blue[cold]).all() and cold.any()
            assert ((red + green + blue == 0) == (load == 0)).all()
        page.resize(700, 900)
        page.wait_for("document.documentElement.scrollWidth <= 700")


def test_what_was_not_recorded_is_said(page: Page, run: MadeRun, tmp_path: Path) -> None:
    load = run.folder / "expert_load.jsonl"
    rows = [{key: row[key] for key in ("step", "layer", "counts")} for row in read_rows(load)]
    load.unlink()
    with JsonLines(load) as file:
        for row in rows:
            file.write(row)
    dense = make_run(tmp_path / "dense", layers=1, steps=3)
    (dense.folder / "expert_load.jsonl").unlink()
    (dense.folder / "timeline.json").unlink()
    sentences = {"bias": "No bias", "traffic": "No bytes", "domains": "not recorded", "pairs": "not counted"}
    with serving(run, dense) as server:
        opened(page, server.url, runs=2)
        for figure, sentence in sentences.items():
            page.evaluate(f"document.getElementById('{figure}').scrollIntoView({{behavior: 'instant'}})")
            page.wait_for(f"document.querySelector('#{figure} .missing').textContent.includes('{sentence}')")
        choose(page, "#first", "1")
        page.evaluate("document.getElementById('load').scrollIntoView({behavior: 'instant'})")
        page.wait_for("document.querySelector('#load .missing').textContent.includes('No step with experts')")


def test_a_server_that_comes_back_is_followed_again(browser: Browser, run: MadeRun) -> None:
    with browser.page() as page:
        with serving(run) as server:
            opened(page, server.url)
            port = server.port
        page.wait_for("document.getElementById('link').textContent.includes('No answer')")
        assert frames(page) == 8
        run.advance(1)
        with serving(run, port=port):
            page.wait_for("dashboard.state.frames == 9")
            assert words(page, "#link") == ""


def test_runs_of_other_shapes(page: Page, tmp_path: Path) -> None:
    """A layer and an expert that the run beside lacks are not marked in it."""
    large = make_run(tmp_path / "large", layers=5, experts=16, ranks=4, steps=2)
    small = make_run(tmp_path / "small", layers=2, experts=8, ranks=1, steps=3)
    with serving(large, small) as server:
        opened(page, server.url, runs=2)
        show(page, LOAD)
        page.evaluate("""(() => {
            window.written = [];
            const write = CanvasRenderingContext2D.prototype.fillText;
            CanvasRenderingContext2D.prototype.fillText = function (text, ...where) {
              written.push(String(text));
              write.call(this, text, ...where);
            };
            select({second: 1, layer: 4, expert: 12});
        })()""")
        page.wait_for("written.includes('7')")
        assert "undefined" not in page.evaluate("written")
        page.evaluate("select({layer: 1})")
        page.wait_for("document.querySelectorAll('#load .plot i')[0].style.display == 'block'")
        assert page.evaluate("document.querySelectorAll('#load .plot i')[1].style.display") == "none"


def test_an_axis_has_numbers(page: Page, run: MadeRun) -> None:
    with serving(run) as server:
        opened(page, server.url)
        for low, high in ((1.05, 1.9), (2.1, 3.3), (0.01, 200)):
            found = page.evaluate(f"logTicks({low}, {high})")
            assert len(found) > 1 and low <= min(found) and max(found) <= high
