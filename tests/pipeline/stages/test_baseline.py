"""The unpruned network."""

from __future__ import annotations

from pathlib import Path

from tests.pipeline.helpers import opened, perform, tiny_config


def test_a_baseline_is_trained_once_per_content(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with opened(config) as run:
        assert "trained" in perform(run, "baseline").baseline.origin
    with opened(config) as run:
        assert "reused" in perform(run, "baseline").baseline.origin
    with opened(config.model_copy(update={"seed": 9})) as run:
        assert "trained" in perform(run, "baseline").baseline.origin
