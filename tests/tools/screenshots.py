"""Pictures of a report for the documentation, by the Chromium that ``make parts`` brings.

    python tests/tools/screenshots.py RUN_DIRECTORY/report.html docs/images

Writes the first screen at 1400 and at 390 pixels, light, and at 1400 dark.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

CHROMIUM = Path(__file__).parents[2] / ".parts" / "chromium" / "chromium"
SCREENS = (("wide", 1400, 1750, "light"), ("narrow", 390, 1750, "light"), ("dark", 1400, 1750, "dark"))


def main(page_file: Path, folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    program = str(CHROMIUM) if CHROMIUM.is_file() else shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, width, height, scheme in SCREENS:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.goto(page_file.absolute().as_uri())
            page.evaluate("reportCharts.all()")
            page.screenshot(path=folder / f"report-{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
