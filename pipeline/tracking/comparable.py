"""What MLflow's charts compare candidates by: how much each part of the network keeps, and how figures are known."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

MOST_PARTS = 20
"""So many axes of a parallel coordinates plot can still be told apart."""
MAX_NAME = 200
"""Characters of a parameter's name; MLflow takes 250."""
Record = Mapping[str, Any]


def name_of(record: Record) -> str:
    """What the run of a candidate is called: once within its run, and in the order of evaluation."""
    candidate = record["candidate"]
    words = [record["stage"], f"{candidate['id']:04d}", candidate["origin"].replace(" ", "-"), record["kind"]]
    return "-".join(word for word in dict.fromkeys(words) if word != "evaluation")


def params_of(record: Record) -> dict[str, str]:
    """Parameters of a candidate's run: origin, precision, how its latency is known, and ``keep.PART`` of its plan."""
    evaluation, known = record["evaluation"], {}
    if "latency_ratio" in evaluation["metrics"]:
        known["latency"] = "measured" if evaluation["metrics"].get("latency_measured", 1) else "predicted"
    told = {"origin": record["candidate"]["origin"], "precision": evaluation.get("precision", "fp32")}
    ratios = keep_ratios(record["candidate"]["plan"])
    return {**told, **known, **{f"keep.{part}"[:MAX_NAME]: f"{ratio:.4g}" for part, ratio in ratios.items()}}


def keep_ratios(plan: str) -> dict[str, float]:
    """Kept channels of a plan's text as fractions: per group, or per part of the network where there are too many.

    Groups are put together by the beginnings of their names, as long as leaves at most ``MOST_PARTS``; for all plans of
    a network alike. Empty where the text is no plan.
    """
    try:
        groups = {name: (_count(group["keep"]), int(group["of"])) for name, group in json.loads(plan)["groups"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    names = [name.split(".") for name in groups]
    depth = max(map(len, names), default=1)
    while depth > 1 and len({tuple(words[:depth]) for words in names}) > MOST_PARTS:
        depth -= 1
    if len({tuple(words[:depth]) for words in names}) > MOST_PARTS:
        depth = 0
    parts: dict[str, tuple[int, int]] = {}
    for words, (kept, size) in zip(names, groups.values(), strict=True):
        part = re.sub(r"[^\w./: -]", "_", ".".join(words[:depth]) or "all")
        before = parts.get(part, (0, 0))
        parts[part] = before[0] + kept, before[1] + size
    return {part: kept / size for part, (kept, size) in parts.items()}


def _count(ranges: str) -> int:
    """How many indices a plan's ranges (``"0-7,9"``) hold."""
    ends = (part.partition("-") for part in ranges.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)
