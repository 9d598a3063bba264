"""Who becomes the champion, and why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.pipeline.run.facts import Facts
from secateur.pipeline.stages.promote import promote
from tests.pipeline.helpers import made_up_facts, opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_a_failed_gate_makes_a_challenger(tmp_path: Path, finished: Any) -> None:
    done, facts = finished
    config = tiny_config(tmp_path, gate={"max_macs_ratio": 0.05})
    with opened(config) as run:
        for file in done.directory.iterdir():
            if file.suffix in (".onnx", ".safetensors", ".json"):
                shutil.copy(file, run.directory)
        for record in done.journal.records[1:]:
            run.journal.append(record)
        run.tracker.start()
        again = perform(run, facts=facts.only(("baseline", "search", "finetune", "export", "benchmark")))
        assert not again.gate.passed
        assert [check.name for check in again.gate.failed] == ["MACs ratio"]
        assert again.promote is not None and not again.promote.promoted
        champion = run.tracker.registry.champion("tiny", "quick")
        assert champion is None or again.register is None or champion.version != again.register.version


@pytest.mark.parametrize(
    ("facts", "asked_for", "reason"),
    [(Facts(), True, "it is not registered yet"), (made_up_facts(), False, "gate.promote is false")],
)
def test_nothing_is_decided_where_there_is_nothing_to_decide(facts: Facts, asked_for: bool, reason: str) -> None:
    run: Any = SimpleNamespace(config=SimpleNamespace(gate=SimpleNamespace(promote=asked_for)))
    decided = promote(run, facts)
    assert (decided.promoted, decided.devices, decided.reason) == (False, {}, reason)
