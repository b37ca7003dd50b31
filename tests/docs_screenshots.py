"""Pictures of the dashboard for docs/: `python -m tests.docs_screenshots RUN [RUN] [--out docs] [--layer N]`.

The first run is shown live and alone; with a second one both are compared. The last picture is of the
exported file in a browser without a network.
"""

import argparse
import io
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from launch.dashboard.export import write_export
from launch.dashboard.server import Server
from launch.dashboard.view import RunView
from tests.browser import Page, chromium

WIDTH, HEIGHT = 1280, 900
MOST_BYTES = 250_000
MARGIN_PX = 16
SHOTS = {
    "overview": ("header", 'section[aria-label="Overview"]'),
    "load": ("#load",),
    "layer": ("#history", "#bias", "#layers"),
    "ranks": ('section[aria-label="Ranks"]', 'section[aria-label="Schedule"]'),
    "domains": ('section[aria-label="Specialisation"]',),
}


def main() -> None:
    """Write docs/dashboard_*.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--layer", type=int, default=0, help="counted from 0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        with served(options.runs[:1]) as url, browser.page() as page:
            _open(page, url, 1, options.layer)
            for name, selectors in SHOTS.items():
                if name == "ranks":
                    page.evaluate("document.querySelector('[aria-label=Specialisation]').hidden = true")
                _shoot(page, options.out / f"dashboard_{name}.png", *selectors)
                page.evaluate("document.querySelector('[aria-label=Specialisation]').hidden = false")
        if len(options.runs) > 1:
            with served(options.runs) as url, browser.page() as page:
                _open(page, url, len(options.runs), options.layer)
                page.evaluate("select({second: 1})")
                _shoot(page, options.out / "dashboard_compare.png", "header", "#controls", "#load")
        exported = Path(folder) / "run.html"
        write_export(exported, [view.view() for view in _views(options.runs[:1])])
        with browser.page() as page:
            page.offline()
            _open(page, exported.as_uri(), 1, options.layer)
            _shoot(page, options.out / "dashboard_offline.png", "header", "#controls", "#load")


@contextmanager
def served(runs: Sequence[Path]) -> Iterator[str]:
    """The address of a server of these runs, which ends with the block."""
    with Server(_views(runs), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def _views(runs: Sequence[Path]) -> list[RunView]:
    return [RunView(run, run.resolve().name) for run in runs]


def _open(page: Page, url: str, runs: int, layer: int) -> None:
    page.resize(WIDTH, HEIGHT)
    page.open(url)
    page.wait_for(f"dashboard.runs.length == {runs}")
    page.evaluate(f"select({{layer: {layer}}})")


def _shoot(page: Page, path: Path, *selectors: str) -> None:
    """A picture with a white margin; of 256 colours where that is needed to stay small."""
    page.screenshot(path, *selectors)
    shot = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    framed = Image.new("RGB", (shot.width + 2 * MARGIN_PX, shot.height + 2 * MARGIN_PX), "white")
    framed.paste(shot, (MARGIN_PX, MARGIN_PX))
    framed.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        few = framed.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
    size = path.stat().st_size
    assert size <= MOST_BYTES, f"{path} takes {size} bytes, more than {MOST_BYTES}"
    print(f"{path}: {framed.width} x {framed.height}, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
