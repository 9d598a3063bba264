"""What the stages of a run found, as one file of its directory: what a report is made from, also of a run that failed.

Prefect keeps the results that a resumed run goes on from; this file is for readers. Of a run that an earlier version of
Secateur took to its end, ``report.json`` holds the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.pipeline.files import write_whole
from secateur.pipeline.run.facts import EARLIER_NAMES, Facts, from_json

FILE, REPORT = "facts.json", "report.json"
LAYERS, GROUPS = "layers.json", "groups.json"
"""Time of every operator of both files; share of the MACs of every channel group, and what is frozen."""
SUSTAINED = "sustained.json"
"""Every second of the compact network's sustained run, and the sensors beside it."""
PER_IMAGE, CHANGED, PICTURES = "test.npz", "test-pictures.json", "pictures.json"
"""What each test image gave; pictures of some that changed; what is found before and after on images of the search."""


def keep(directory: Path, stage: str, result: Mapping[str, Any]) -> None:
    """Write down what a stage found, beside what others did."""
    known = {**_read(directory / FILE), stage: dict(result)}
    write_whole(directory / FILE, json.dumps({"format": 1, "facts": known}) + "\n")


def read(directory: Path) -> Facts:
    """What a run's stages found, as far as they came; what cannot be read is left out."""
    found = {}
    for stage, result in (_read(directory / FILE) or _of_report(directory / REPORT)).items():
        try:
            found[stage] = from_json(stage, result)
        except ValueError:
            continue
    return Facts(**found)


def _of_report(file: Path) -> dict[str, Any]:
    known = _read(file)
    return {**{name: known[earlier] for name, earlier in EARLIER_NAMES.items() if earlier in known}, **known}


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
