"""Shared set-up: property tests are neither timed nor random, and every test has a home of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tools.third import THIRDS, third_of

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:  # two workers share two cores
    os.environ["OMP_NUM_THREADS"] = "1"
LOCKS = tempfile.TemporaryDirectory(prefix="secateur-locks-")
"""Every test process has locks of its own, beside those of the machine: tests check no times."""
os.environ["SECATEUR_LOCKS"] = LOCKS.name
Path(LOCKS.name).chmod(0o1777)  # as /run/lock is

settings.register_profile("secateur", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("secateur")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test-long` runs a third of the long tests; over three commits every one has its turn."""
    if (wanted := os.environ.get("SECATEUR_LONG_PART", "")) in THIRDS:
        left_out = [item for item in items if third_of(item.nodeid) != wanted]
        items[:] = [item for item in items if third_of(item.nodeid) == wanted]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    if (trust := sys.modules.get("secateur.pipeline.config.trust")) is not None:
        trust.withdraw_all()


@pytest.fixture
def trusted() -> Callable[[str], None]:
    """Consent, as a person would give it, to a ``module:factory`` of the tests' own."""
    from secateur.pipeline.config import trust
    from secateur.pipeline.config.schema import RunFile

    def consent(name: str) -> None:
        config = RunFile(name="tests", workload={"name": "detection", "model": {"name": name}})
        trust.allow(entry for found in trust.code_in(config, Path("run.yaml")) for entry in found.entries)

    return consent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests drove a browser; ``.ci/run`` asks."""
    ran = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    browser = [report for report in ran if "report/test_browser.py" in report.nodeid and report.when == "call"]
    if any("report/test_browser.py" in report.nodeid for report in terminalreporter.getreports("skipped")) or browser:
        terminalreporter.write_line(f"Browser tests that ran: {len(browser)}")
