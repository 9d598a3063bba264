"""The report's page: how large it is, how soon its first charts are there, how fast its slider answers.

    python benchmarks/report.py [--candidates 5000] [--repeats 5] [--json PATH]

A made-up run is rendered, and opened in the Chromium that `make parts` brings (or the one on PATH). `size_mb`: of the
page. `render_s`: making page, JSON and Markdown of a run. `first_charts_s`: from the beginning of loading until the
first three charts have marks. `slider_s`: from moving the slider until the chart has been drawn anew. Medians of
`--repeats`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.pipeline.report.document import document, text_of
from secateur.pipeline.report.page import page as page_of
from secateur.pipeline.report.sections import sections
from secateur.pipeline.report.testing import made_up

CHROMIUM = Path(__file__).parents[1] / ".parts" / "chromium" / "chromium"
FIRST = ("tradeoff", "macs", "gates")
SLIDE = """async (share) => {
  const slider = document.querySelector("[data-limit='tradeoff']"), begun = performance.now();
  slider.value = Number(slider.min) + share * (slider.max - slider.min);
  slider.dispatchEvent(new Event("input"));
  await reportCharts.views.get("tradeoff").runAsync();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return (performance.now() - begun) / 1000;
}"""


def timed(file: Path, repeats: int) -> tuple[float, float]:
    """Seconds until the first three charts are drawn, and of an answer of the slider; medians."""
    from playwright.sync_api import sync_playwright

    program = str(CHROMIUM) if CHROMIUM.is_file() else shutil.which("chromium")
    first, slider = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for number in range(repeats):
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            begun = time.perf_counter()
            page.goto(file.as_uri(), wait_until="commit")
            for name in FIRST:
                page.locator(f"[data-chart='{name}'][data-drawn] .role-mark path").first.wait_for(state="attached")
            first.append(time.perf_counter() - begun)
            slider.append(page.evaluate(SLIDE, (number + 1) / (repeats + 1)))
            page.close()
        browser.close()
    return statistics.median(first), statistics.median(slider)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--candidates", type=int, default=5000)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    material = made_up(given.candidates)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        made = sections(material)
        text = page_of(material, made, text_of(document(material, made)))
        rendered = time.perf_counter() - begun
        file = Path(folder) / "report.html"
        file.write_text(text, encoding="utf-8")
        first, slider = timed(file, given.repeats)
        size = file.stat().st_size / 1e6
    rows = [
        {
            "candidates": given.candidates,
            "render_s": rendered,
            "size_mb": size,
            "first_charts_s": first,
            "slider_s": slider,
        }
    ]
    figures = [
        Figure("size_mb", size, 3.0, size < 3.0),
        Figure("first_charts_s", first, 2.0, first < 2.0),
        Figure("slider_s", slider, 2.0, slider < 2.0),
    ]
    present("The report's page", rows, figures, given.json)


if __name__ == "__main__":
    main()
