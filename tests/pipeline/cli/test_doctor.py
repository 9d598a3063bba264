"""``secateur doctor`` tells what is wrong with this machine, its stores and devices, each with its fix."""

from __future__ import annotations

import json

import pytest

from secateur import __version__
from secateur.device_profiles.check import Check
from secateur.pipeline import errors
from secateur.pipeline.cli import devices
from tests.pipeline.cli.test_app import Captured, call

NOBODY = "http://127.0.0.1:9"
"""An address at which nothing listens."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.check, "ask", lambda profile: (Check("reachable", "ok", "here"),))


def checks_of(captured: Captured) -> dict[str, dict[str, str]]:
    document = json.loads(captured.readouterr().out)
    assert document["version"] == __version__
    return {check["name"]: check for check in document["checks"]}


@pytest.mark.usefixtures("device")
def test_a_machine_that_is_ready(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "doctor", "--json") == errors.EXIT_OK
    checks = checks_of(capsys)
    assert {"python", "torch", "cores", "bf16", "disk", "MLflow", "local: reachable"} <= set(checks)
    assert "missing" not in {check["status"] for check in checks.values()}


@pytest.mark.usefixtures("device")
def test_servers_that_do_not_answer_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("SECATEUR_TRACKING_URI", NOBODY)
    monkeypatch.setenv("PREFECT_API_URL", f"{NOBODY}/api")
    assert call(monkeypatch, "doctor", "--json") == errors.EXIT_SURROUNDINGS
    checks = checks_of(capsys)
    assert (checks["MLflow"]["status"], checks["Prefect"]["status"]) == ("missing", "missing")
    assert "SECATEUR_TRACKING_URI" in checks["MLflow"]["fix"]
    assert "unset PREFECT_API_URL" in checks["Prefect"]["fix"]


def test_what_is_missing_on_a_device_is_missing_here(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    broken = Check("onnxruntime", "missing", "cannot be imported", "python -m pip install onnxruntime")
    monkeypatch.setattr(devices.check, "ask", lambda profile: (broken,))
    assert call(monkeypatch, "doctor") == errors.EXIT_SURROUNDINGS
    shown = capsys.readouterr().out
    assert "local: onnxruntime, fix: python -m pip install onnxruntime" in shown
    assert "this machine is not ready: 1 missing" in shown


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "--version") == errors.EXIT_OK
    assert capsys.readouterr().out == f"secateur {__version__}\n"
