"""The unpruned network."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.pipeline.training import trials
from tests.numerics import pretend_bf16
from tests.pipeline.helpers import opened, perform, tiny_config


def test_a_baseline_is_trained_once_per_content(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with opened(config) as run:
        assert "trained" in perform(run, "baseline").baseline.origin
    with opened(config) as run:
        assert "reused" in perform(run, "baseline").baseline.origin
    with opened(config.model_copy(update={"seed": 9})) as run:
        assert "trained" in perform(run, "baseline").baseline.origin


def test_a_baseline_is_shared_by_machines_that_train_it_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where precision is left to the machine, its content names what it was there."""

    def origin(precision: str, *, native: bool) -> str:
        pretend_bf16(monkeypatch, native)
        monkeypatch.setattr(trials, "faster", lambda seconds: "bf16")
        config = tiny_config(tmp_path, baseline={"epochs": 0.1, "autocast": precision})
        with opened(config) as run:
            return perform(run, "baseline").baseline.origin

    found = [origin("auto", native=native) for native in (False, True, False, True)]
    assert [text.partition(" ")[0] for text in found] == ["trained", "trained", "reused", "reused"]
    assert [text.rpartition(" ")[2] for text in found] == ["fp32)", "bf16)"] * 2
    assert [origin(name, native=True).partition(" ")[2] for name in ("fp32", "bf16")] == [
        text.partition(" ")[2] for text in found[:2]
    ]
