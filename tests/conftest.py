"""Shared set-up: property tests are neither timed nor random, and every test has a home of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("secateur", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("secateur")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
