"""What pages repeat of the code is what the code says now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

PAGES = [page for page in generate.pages() if generate.BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_generated_block_is_as_the_code_has_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, "write it anew: make generate"


def test_every_key_of_the_run_file_is_in_the_reference() -> None:
    page = (ROOT / "docs/reference/run-file.md").read_text(encoding="utf-8")
    keys = {key.place for key in generate._keys() if not key.section and not key.place.startswith("search.options.")}
    ends = {place: {place, place.partition(".")[2], place.rpartition(".")[2]} for place in keys}
    assert {place for place, names in ends.items() if not any(f"`{name}`" in page for name in names)} == set()
