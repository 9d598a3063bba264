"""Run a run file and keep what pages show of it: ``python docs/figures.py NAME FILE`` writes ``figures/NAME.json``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur.device_profiles.agent import describe_device

SHOWN = ("device", "passed", "checks", "models", "speedup")


def kept(outcome: dict[str, Any], command: str) -> dict[str, Any]:
    """Of a run's document what says nothing of a machine's folders."""
    made = {
        "command": command,
        "processor": describe_device().get("cpu", "unknown"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return {"made": made, **{key: outcome[key] for key in SHOWN}}


def main() -> int:
    name, file = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "secateur", "run", str(Path(file).resolve()), "--quiet", "--json"]
        done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, check=True)
    content = kept(json.loads(done.stdout), f"secateur run {file} --json")
    target = Path(__file__).parent / "figures" / f"{name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
