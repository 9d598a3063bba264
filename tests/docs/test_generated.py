"""What pages repeat of the code is what the code says now."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks._output import Figure, present

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

PAGES = [page for page in generate.pages() if generate.BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_generated_block_is_as_the_code_has_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, "write it anew: make generate"


def test_a_page_shows_what_a_benchmark_kept_and_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FIGURES", tmp_path)
    file = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py", "--only", "a b", "--json", str(file)])
    present("speed", [{"network": "n", "ms": 1.23456}], [Figure("ratio", 0.5, 1.0, True)], file)
    shown = generate.benchmark("speed")
    assert "| n | 1.235 |" in shown
    assert "(`python benchmarks/speed.py --only 'a b'`, 20" in shown
    assert generate.row("speed", "n", "ms") == "ms 1.235"
    assert "| `ratio` | 0.5 | 1 |" in generate.bounds("speed")


def test_every_kept_figure_stands_on_a_page_and_names_its_command() -> None:
    calls = " ".join(block["call"] for page in PAGES for block in generate.BLOCK.finditer(page.read_text("utf-8")))
    for file in generate.FIGURES.glob("*.json"):
        made = json.loads(file.read_text(encoding="utf-8"))["made"]
        assert all(made[key] for key in ("command", "processor", "date")), file.name
        assert file.stem in calls.split(), f"{file.name} is on no page"


def test_every_key_of_the_run_file_is_in_the_reference() -> None:
    page = (ROOT / "docs/reference/run-file.md").read_text(encoding="utf-8")
    keys = {key.place for key in generate._keys() if not key.section and not key.place.startswith("search.options.")}
    ends = {place: {place, place.partition(".")[2], place.rpartition(".")[2]} for place in keys}
    assert {place for place, names in ends.items() if not any(f"`{name}`" in page for name in names)} == set()
