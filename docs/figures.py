"""Keep what pages show of a finished run: its figures, and the command and machine that made them.

python docs/figures.py RUN_FILE RUN_DIRECTORY      # writes NAME.json into docs/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

METRICS = ("top1", "map50", "macs", "params", "size_bytes", "p50_ms")


def kept(report: dict[str, Any], file: str, date: str) -> dict[str, Any]:
    """Of a run's ``report.json`` what says nothing of a machine's folders."""
    facts, machine = report["facts"], report["environment"]
    gate = facts["gate"]
    models = {name: {key: known[key] for key in METRICS if key in known} for name, known in gate["models"].items()}
    return {
        "made": {
            "command": f"secateur run {file}",
            "processor": f"{machine['cpu']}, {machine['cpus']} cores",
            "date": date,
            "flags": facts["benchmark"]["flags"],
        },
        "device": facts["benchmark"]["device"],
        "passed": gate["passed"],
        "models": models,
        "speedup": facts["benchmark"]["speedup"],
    }


def main() -> int:
    file, directory = sys.argv[1], Path(sys.argv[2])
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    day = directory.resolve().name.removeprefix(f"{report['config']['name']}-")[:8]
    content = kept(report, file, f"{day[:4]}-{day[4:6]}-{day[6:]}")
    target = Path(__file__).parent / "figures" / f"{Path(file).stem}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
