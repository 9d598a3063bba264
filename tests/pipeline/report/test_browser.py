"""The page in a real browser: Debian's Chromium, driven by playwright. Skipped where there is none (``make parts``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.pipeline.report.document import document, text_of
from secateur.pipeline.report.page import page as page_of
from secateur.pipeline.report.sections import sections
from secateur.pipeline.report.testing import made_up

HERE = Path(__file__).parent
PARTS = HERE.parents[2] / ".parts" / "chromium" / "chromium"
CHROMIUM = str(PARTS) if PARTS.is_file() else shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make parts` brings it"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of a made-up run as a file, and the same as JSON."""
    material = made_up()
    made = sections(material)
    told = text_of(document(material, made))
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(page_of(material, made, told), encoding="utf-8")
    return file, json.loads(told)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """The page in a browser, with all that it complained of and asked for."""

    def __init__(self, browser: Any, file: Path, width: int = 1400, **settings: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def draw(self) -> Any:
        """The page with every chart drawn."""
        self.page.evaluate("reportCharts.all()")
        return self.page

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def figures(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [figure for section in told["sections"] for figure in section["figures"]]


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_charts_are_drawn_with_titles_and_nothing_is_asked_for(
    browser: Any, report: Any, width: int, scheme: str
) -> None:
    file, told = report
    with Opened(browser, file, width, color_scheme=scheme) as opened:
        page = opened.draw()
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith("data:")] == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        for figure in figures(told):
            place = page.locator(f"[data-chart='{figure['name']}']")
            assert place.get_attribute("data-drawn") == "yes", figure["name"]
            titles = place.locator(".role-axis-title text").all_text_contents()
            x = figure["chart"]["x"]["title"]
            assert x in titles and figure["chart"]["y"]["title"] in titles, (figure["name"], titles)
            assert place.locator(".mark-symbol path, .mark-rect path, .mark-line path").count() > 0, figure["name"]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")


def test_charts_show_the_numbers_of_the_json(browser: Any, report: Any) -> None:
    file, told = report
    with Opened(browser, file) as opened:
        page = opened.draw()
        data = json.loads(
            page.locator("#report-data").inner_text()
            or page.evaluate("document.getElementById('report-data').textContent")
        )
        for figure in figures(told):
            for layer, drawn in zip(figure["chart"]["layers"], data["charts"][figure["name"]]["layer"], strict=True):
                places = [(row.get("xs") or row.get("x"), row.get("y")) for row in layer["rows"]]
                assert places == [(row.get("xs") or row.get("x"), row.get("y")) for row in drawn["data"]["values"]]
        figure = next(figure for figure in figures(told) if figure["name"] == "macs")
        symbols = page.locator("[data-chart='macs'] .mark-symbol path")
        assert symbols.count() == len(figure["chart"]["layers"][-1]["rows"])
        cells = page.locator("#figure-macs table tbody tr")
        assert cells.count() == len(figure["table"]["rows"])


def test_axes_switch_the_slider_answers_and_a_click_pins(browser: Any, report: Any) -> None:
    file, _ = report
    with Opened(browser, file) as opened:
        page = opened.draw()
        page.locator("[data-limit='tradeoff']").focus()
        for _ in range(5):
            page.keyboard.press("PageDown")
        best = page.locator("[data-best='tradeoff']").inner_text()
        assert " ms (" in best and "the best is" in best
        faint = page.locator("[data-chart='tradeoff'] .mark-symbol path[opacity='0.15']")
        assert faint.count() > 0
        page.locator("[data-chart='tradeoff'] .mark-symbol path").first.click(force=True)
        assert "layer1.0.conv1 " in page.locator("[data-pinned='tradeoff']").inner_text()
        page.select_option("[data-pin='tradeoff']", index=3)
        assert "candidate 2" in page.locator("[data-pinned='tradeoff']").inner_text()
        page.select_option("[data-switch='tradeoff']", "macs")
        title = page.locator("[data-chart='tradeoff'] .role-axis-title text", has_text="MACs, share of the baseline's")
        title.wait_for()
        assert opened.complaints == []


def test_a_slider_hides_layers_that_hardly_differ(browser: Any, report: Any) -> None:
    file, told = report
    with Opened(browser, file) as opened:
        page = opened.draw()
        bars = page.locator("[data-chart='layers'] .mark-rect path")
        figure = next(figure for figure in figures(told) if figure["name"] == "layers")
        every = figure["chart"]["layers"][0]["rows"]
        assert bars.count() == len(every)
        page.locator("[data-least='layers']").focus()
        page.keyboard.press("End")
        most = max(row["size"] for row in every)
        page.wait_for_function("document.querySelectorAll(\"[data-chart='layers'] .mark-rect path\").length < 3")
        assert bars.count() == sum(row["size"] == most for row in every) > 0
        assert page.locator("[data-shown='layers']").inner_text().endswith(f"1 of {len(every) // 2} are shown")
        assert opened.complaints == []


def test_bars_are_filled_by_their_share_and_hatched_where_frozen(browser: Any, report: Any) -> None:
    file, told = report
    with Opened(browser, file) as opened:
        page = opened.draw()
        figure = next(figure for figure in figures(told) if figure["name"] == "widths")
        wanted = {row["fill"] for row in figure["chart"]["layers"][0]["rows"] if "fill" in row} | {"url(#hatch)"}
        fills = page.locator("[data-chart='widths'] .mark-rect path").evaluate_all(
            "(all) => all.map((each) => each.getAttribute('fill'))"
        )
        assert wanted <= set(fills)
        assert page.locator("#figure-widths .ramp").is_visible()


def test_the_keyboard_reaches_everything(browser: Any, report: Any) -> None:
    file, told = report
    with Opened(browser, file) as opened:
        page = opened.draw()
        wanted = page.locator("a[href], summary, select, input, pre, .scroll").count()
        reached = page.evaluate(
            "[...document.querySelectorAll('a[href], summary, select, input, pre, .scroll')]"
            ".filter((each) => each.tabIndex >= 0).length"
        )
        assert reached == wanted > 40
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        names = page.locator("nav a").all_inner_texts()
        assert names == [section["title"] for section in told["sections"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Any, report: Any, scheme: str) -> None:
    file, _ = report
    with Opened(browser, file, color_scheme=scheme) as opened:
        page = opened.draw()
        page.evaluate((HERE / "axe" / "axe.min.js").read_text(encoding="utf-8"))
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
        found = page.evaluate("(tags) => axe.run(document, { runOnly: tags, resultTypes: ['violations'] })", tags)
        faults = {each["id"]: each["nodes"][0]["html"][:200] for each in found["violations"]}
        assert not faults


def test_charts_are_drawn_when_they_come_into_view_and_all_before_printing(
    browser: Any, report: Any, tmp_path: Path
) -> None:
    file, told = report
    with Opened(browser, file, color_scheme="dark") as opened:
        page = opened.page
        page.wait_for_selector("[data-chart='tradeoff'][data-drawn]")
        assert page.locator("[data-drawn]").count() < len(figures(told)), "those further down wait"
        page.pdf(path=str(tmp_path / "report.pdf"), format="A4", print_background=True)
        assert page.locator("[data-drawn]").count() == len(figures(told))
        assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") >= 5
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_every_chart_is_still_there_with_drawn_titles(browser: Any, report: Any) -> None:
    file, told = report
    with Opened(browser, file, 390, java_script_enabled=False) as opened:
        for figure in figures(told):
            still = opened.page.locator(f"[data-chart='{figure['name']}'] svg.still")
            titles = still.locator("text.title").all_text_contents()
            assert titles == [figure["chart"]["x"]["title"], figure["chart"]["y"]["title"]]
            assert still.locator("path, rect").count() > 3
        assert not opened.page.locator("[data-controls='tradeoff']").is_visible()
