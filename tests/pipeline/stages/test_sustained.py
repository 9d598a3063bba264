"""Calls without a pause on a board that gets hot, on one without sensors, and on one that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.device_profiles import DeviceError
from secateur.pipeline.devices.fleet import Device
from secateur.pipeline.progress import Silent
from secateur.pipeline.stages.sustained import sustained
from tests.device_profiles.tiny import quick_profile
from tests.pipeline.helpers import opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


class Board:
    """A board that slows down as it gets hot; it tells what its sensors say, where it has some."""

    def __init__(self, sensors: bool = True) -> None:
        self.sensors, self.requests = sensors, list[dict[str, Any]]()

    def prepare(self) -> dict[str, Any]:
        return {}

    def put(self, path: Path) -> str:
        return f"/board/{path.name}"

    def run(self, request: dict[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        self.requests.append(request)
        assert timeout_s > request["sustain_s"]
        count = int(request["sustain_s"])
        seconds = [{"t_s": float(i), "calls": 100, "p50_ms": 1.0 + 0.02 * i, "p95_ms": 2.0 + i} for i in range(count)]
        raw = {"wall_ms": [1.0] * 3, "cpu_ms": [1.0] * 3, "load_ms": 1.0, "first_ms": 2.0, "output_sha256": "f"}
        told = [{"t_s": 3.0, "phase": "timing", "temperature_c": 20.0, "freq_mhz": 2000.0}]
        for i in range(count):
            reading = {"temperature_c": 40.0 + i, "freq_mhz": 1800.0 - i} if self.sensors else {"loadavg": 1.0}
            told.append({"t_s": 5.0 + i, "phase": "sustained", **reading})
        models = {model["name"]: {**raw, "sustained": seconds} for model in request["models"]}
        return {"models": models, "environment": {"telemetry": told}, "started": 0.0, "ended": 1.0}

    def fetch(self, place: str, to: Path) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "compact.onnx").write_bytes(b"a network")
    return tmp_path / "compact.onnx"


def test_a_board_that_gets_hot_is_told_by_the_second_with_its_sensors(model: Path) -> None:
    board = Board()
    facts, files = sustained(Device(quick_profile(), board), model, model.parent, 50.0, Silent())
    assert facts is not None
    assert [request["sustain_s"] for request in board.requests] == [50.0]
    assert (facts.calls, facts.first_p50_ms, facts.last_p50_ms) == (5000, pytest.approx(1.04), pytest.approx(1.94))
    assert facts.temperature_c == (40.0, 89.0, 89.0) and facts.freq_mhz == (1800.0, 1751.0, 1751.0)
    kept = json.loads((model.parent / "sustained.json").read_text())
    assert list(files) == ["sustained.json"] and len(kept["seconds"]) == 50
    assert kept["sensors"][0] == {"t_s": 0.0, "temperature_c": 40.0, "freq_mhz": 1800.0}, "from its own beginning on"


def test_a_board_without_sensors_tells_latencies_only(model: Path) -> None:
    facts, _ = sustained(Device(quick_profile(), Board(sensors=False)), model, model.parent, 4.0, Silent())
    assert facts is not None and facts.calls == 400
    assert facts.temperature_c is None and facts.freq_mhz is None


def test_nothing_is_done_unless_asked_and_an_emulated_device_does_without(model: Path) -> None:
    board = Board()
    assert sustained(Device(quick_profile(), board), model, model.parent, 0.0, Silent()) == (None, {})
    assert sustained(Device(quick_profile(timing=False), board), model, model.parent, 4.0, Silent()) == (None, {})
    assert not board.requests

    def fails(*_: Any, **__: Any) -> Any:
        raise DeviceError("it is too hot", "device-error")

    board.run = fails  # type: ignore[method-assign]
    assert sustained(Device(quick_profile(), board), model, model.parent, 4.0, Silent()) == (None, {})


def test_a_run_that_asks_for_it_shows_heat_in_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    search = {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.8}}
    changes: dict[str, Any] = {"device": {"sustain_s": 1.2}, "search": search, "finetune": {"epochs": 0.1, "top": 1}}
    with opened(tiny_config(tmp_path, **changes)) as run:
        facts = perform(run, "report")
        page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert facts.benchmark.sustained.calls > 0
    assert "sustained.json" in facts.benchmark.files
    assert "Heat: a sustained run" in page and "of calls without a pause" in page
