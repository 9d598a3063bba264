"""The runs of a home, as their directories tell: which there are, how far each is, and what came of it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from secateur.pipeline.errors import UserError
from secateur.pipeline.run.facts import EARLIER_NAMES
from secateur.pipeline.run.journal import read_journal

Status = Literal["running", "passed", "not passed", "stopped", "unreadable"]


@dataclass(frozen=True)
class Overview:
    """One run.

    Args:
        name: of its directory, which is its id.
        status: ``stopped`` = it has not come to its gate, and ``secateur resume`` continues it.
        begun: local time, ISO 8601.
        facts: what its report says, by stage; empty before.
        config: its run file.
    """

    name: str
    directory: Path
    status: Status
    begun: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON, in short: of the facts those of the gate."""
        gate = self.facts.get("gate", {})
        return {
            "run": self.name,
            "directory": str(self.directory),
            "status": self.status,
            "begun": self.begun,
            "workload": _at(self.config, "workload", "name"),
            "model": _at(self.config, "workload", "model", "name"),
            "method": _at(self.config, "search", "method"),
            "device": _at(self.config, "device", "profile"),
            "metric": gate.get("metric"),
            "models": gate.get("models"),
            "checks": gate.get("checks"),
            "speedup": _at(self.facts, "benchmark", "speedup", "value"),
        }


def overviews(home: Path) -> list[Overview]:
    """Every run of a home, the newest first."""
    directories = [file.parent for file in (home / "runs").glob("*/run.yaml")]
    return sorted(map(overview, directories), key=lambda run: (run.begun, run.name), reverse=True)


def named(home: Path, name: str) -> Path:
    """A run directory by its path, its name, or a name's beginning that only one run has.

    Raises:
        UserError: there is none, or there are several.
    """
    if (Path(name) / "run.yaml").is_file():
        return Path(name)
    names = sorted(file.parent.name for file in (home / "runs").glob("*/run.yaml"))
    meant = [each for each in names if each == name] or [each for each in names if each.startswith(name)]
    if len(meant) == 1:
        return home / "runs" / meant[0]
    what = f"several runs begin with {name!r}: {', '.join(meant)}" if meant else f"there is no run {name!r} in {home}"
    raise UserError(f"{what}; `secateur runs list` shows all")


def overview(directory: Path) -> Overview:
    """What a run directory tells; of a damaged one, that it is unreadable."""
    begun = datetime.fromtimestamp((directory / "run.yaml").stat().st_mtime).isoformat(timespec="seconds")
    try:
        config = yaml.safe_load((directory / "run.yaml").read_text(encoding="utf-8"))
        facts = _facts(directory)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        config, facts = None, {}
    if not isinstance(config, dict):
        return Overview(directory.name, directory, "unreadable", begun, {}, {})
    gate = facts.get("gate")
    status: Status = "stopped"
    if _is_open(directory / "journal.jsonl"):
        status = "running"
    elif isinstance(gate, dict):
        status = "passed" if gate.get("passed") else "not passed"
    return Overview(directory.name, directory, status, begun, config, facts)


def num_candidates(directory: Path) -> int:
    """Candidates that a run's search has evaluated so far."""
    if not (directory / "journal.jsonl").is_file():
        return 0
    records = read_journal(directory / "journal.jsonl")
    return sum(record.get("stage") == "search" and record["kind"] == "evaluation" for record in records)


def _facts(directory: Path) -> dict[str, Any]:
    """The facts of a run's report; empty where there is none."""
    file = directory / "report.json"
    facts = json.loads(file.read_text(encoding="utf-8")).get("facts", {}) if file.is_file() else {}
    return {**facts, **{name: facts[earlier] for name, earlier in EARLIER_NAMES.items() if earlier in facts}}


def _is_open(journal: Path) -> bool:
    """Whether a process has a run open: it holds the lock of the journal."""
    try:
        with journal.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _at(data: Mapping[str, Any], *place: str) -> Any:
    """What stands at a place of nested mappings; None where nothing does."""
    for key in place:
        data = data.get(key) if isinstance(data, Mapping) else None  # type: ignore[assignment]
    return data
