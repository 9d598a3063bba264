"""Where the flow looks for what a stage found before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefect.cache_policies import INPUTS

from secateur.pipeline.flow.compress import key_of
from secateur.pipeline.stages.order import STAGES

STAGE = {stage.name: stage for stage in STAGES}


def test_a_result_of_a_run_begun_by_an_earlier_version_is_found_by_the_names_of_then(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(run_id="r", config=SimpleNamespace(digest="d"), directory=tmp_path)
    kept = tmp_path / "stages"
    kept.mkdir()
    assert key_of(run, STAGE["gate"], {})["stage"] == "gate"
    earlier = {"run": "r", "config": "d", "stage": "judge", "version": STAGE["gate"].version, "facts": "{}"}
    (kept / str(INPUTS.compute_key(None, {"key": earlier}, {}))).touch()  # type: ignore[arg-type]
    assert key_of(run, STAGE["gate"], {}) == earlier
    assert key_of(run, STAGE["report"], {"gate": {}})["facts"] == '{"gate": {}}'
