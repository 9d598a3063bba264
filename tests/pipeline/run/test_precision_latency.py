from __future__ import annotations

from pathlib import Path

from secateur.pipeline.run import precision_latency
from secateur.pipeline.run.journal import Journal


def test_it_is_measured_once_for_each_precision_of_integers(tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(name: str) -> dict[str, float]:
        asked.append(name)
        return {"latency_ratio": 1.2, "latency_ratio.pc": 0.5, "latency_ratio.pi": 1.2}

    journal = Journal(tmp_path / "journal.jsonl", "run", "config", "data", ("top1", "top1"), {})
    tried = ("fp32", "int8", "int8 except conv1")
    for _ in range(2):
        ratios = precision_latency.settle(journal, tried, ("pc", "pi"), measure)
    journal.close()
    assert ratios == {"int8": {"pc": 0.5, "pi": 1.2}} and asked == ["int8"]
    (sentence,) = precision_latency.told(ratios, dict.fromkeys(("pc", "pi"), "U8U8"))
    assert "on pi int8 makes the unpruned network slower: 1.20 of its latency in fp32 (number types U8U8" in sentence


def test_floats_are_not_measured(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", "run", "config", "data", ("top1", "top1"), {})
    assert precision_latency.settle(journal, ("fp32", "fp16"), ("pc",), lambda _: {}) is None
    journal.close()
