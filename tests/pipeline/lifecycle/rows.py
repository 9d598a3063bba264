"""A small row of real digits, as a folder of rows, and a finished unit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.pipeline.lifecycle import rows
from secateur.pipeline.lifecycle.rows import Unit
from tests.pipeline.helpers import tiny_config

ROW: dict[str, Any] = {
    "claim": "Small networks can be cut",
    "source": "nobody",
    "published": {"macs_removed": 0.4, "drop_pp": -0.1},
    "order": 1,
    "units": ["uniform"],
    "goal": {"cpu": [{"figure": "macs_removed", "unit": "uniform", "at_least": 0.4}]},
    "needs": ["nothing"],
}
UNIT = Unit("small", "uniform", 0, "cpu")


def write_row(folder: Path, monkeypatch: Any, **changes: Any) -> Path:
    """A folder of rows with the row ``small``, which stands in for the shipped ones from now on."""
    place = folder / "rows" / "small"
    place.mkdir(parents=True, exist_ok=True)
    search = {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.6}, "channel_multiple": 1}
    training = {"epochs": 1, "keep": "best"}
    config = tiny_config(folder, search=search, baseline=training, finetune={**training, "top": 1})
    (place / "uniform.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (place / "row.yaml").write_text(yaml.safe_dump({**ROW, **changes}))
    monkeypatch.setattr(rows, "ROWS", folder / "rows")
    return place
