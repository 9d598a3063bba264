"""Pictures of reports for the documentation, by the Chromium that ``make parts`` brings.

    python tests/tools/screenshots.py PAGE.html docs/images [NAME] [SCREEN...]

Writes the first screen at 1400 and at 390 pixels, light, and at 1400 dark, as NAME-SCREEN.png (NAME: the page's).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image

CHROMIUM = Path(__file__).parents[2] / ".parts" / "chromium" / "chromium"
SCREENS = {"wide": (1400, 1100, "light"), "narrow": (390, 844, "light"), "dark": (1400, 1100, "dark")}
COLOURS = 64
"""Of a picture, which makes it a quarter as large."""


def main(page_file: Path, folder: Path, name: str = "", *screens: str) -> None:
    """Write the pictures of one page.

    Args:
        name: what they begin with; empty = the page's file.
        screens: of ``SCREENS``; none = all.
    """
    from playwright.sync_api import sync_playwright

    program = str(CHROMIUM) if CHROMIUM.is_file() else shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for screen in screens or SCREENS:
            width, height, scheme = SCREENS[screen]
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.goto(page_file.absolute().as_uri())
            page.evaluate("reportCharts.all()")
            file = folder / f"{name or page_file.stem}-{screen}.png"
            page.screenshot(path=file)
            with Image.open(file) as picture:
                picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
            context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
