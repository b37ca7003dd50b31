"""The pictures of docs/dashboard.md, from two runs and one that is made up in DeepSeek-V3's size.

    python -m tests.docs_screenshots RUN RUN

They show what tests/launch/test_dashboard_page.py checks: whoever changes the page makes them anew.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from launch.dashboard.export import write_export
from launch.dashboard.view import RunView
from tests.browser import Page, chromium
from tests.launch.test_dashboard_page import opened, show
from tests.made_run import make_run

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(runs: list[Path]) -> None:
    """Write docs/dashboard_*.png."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        scratch = Path(folder)
        with opened(browser, runs[0]) as page:
            page.evaluate("select({layer: 1, expert: 3})")
            shoot(page, "layer", "section[aria-label='Expert load']")
            shoot(page, "ranks", "section[aria-label=Ranks]")
            shoot(page, "domains", "section[aria-label=Specialisation]")
        with opened(browser, *runs) as page:
            page.evaluate("(select({second: 1}), refreshWords())")
            shoot(page, "comparison", "main > section")
            shoot(page, "side_by_side", "#load")
        large = make_run(
            scratch / "v3", layers=60, experts=256, ranks=16, top_k=8, steps=40, mtp=True, pairs=False
        )
        with opened(browser, large.folder) as page:
            page.evaluate("select({layer: 30, expert: 77})")
            shoot(page, "v3_size", "#load")
        exported = scratch / "export.html"
        write_export(exported, [RunView(run, run.name).view() for run in runs])
        with browser.page() as page:
            page.offline()
            show(page, exported.as_uri(), len(runs))
            shoot(page, "offline", "body", scale=0.5)


def shoot(page: Page, name: str, selector: str, scale: float = 1) -> None:
    """Write an element of the page."""
    path = DOCS / f"dashboard_{name}.png"
    page.screenshot(path, selector, margin=16, scale=scale)
    Image.open(io.BytesIO(path.read_bytes())).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
