"""docs/results.md is what the kept results say, and these agree with themselves and stay small."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.pipeline.lifecycle.results_page import page
from secateur.pipeline.lifecycle.verify import verify

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
MOST = {"detection": 8_000_000, "mobilenet": 8_000_000, "": 2_000_000}
"""Bytes of a compact model, by a word in its run file."""


def test_the_page_is_made_of_the_facts() -> None:
    told = "run: secateur results results --write docs/results.md"
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page(RESULTS), told


FOLDERS = [file.parent for file in sorted(RESULTS.glob("*/*/facts.json"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_kept_results_agree_with_themselves_and_are_small(folder: Path) -> None:
    assert verify(folder, computing=False).faults == ()
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    most = next(size for word, size in MOST.items() if word in text)
    assert (folder / "model.safetensors").stat().st_size <= most


def test_all_results_together_are_small() -> None:
    assert sum(file.stat().st_size for file in RESULTS.rglob("*") if file.is_file()) <= 60_000_000
