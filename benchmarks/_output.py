"""How every benchmark speaks: a table for people, ``--json PATH`` for machines."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One number with the bound it must keep (``ok``).

    Args:
        value: None = it was not measured, and ``why`` says why.
    """

    name: str
    value: float | None
    bound: float
    ok: bool
    why: str = ""

    @classmethod
    def missing(cls, name: str, bound: float, why: str) -> Figure:
        """One that could not be measured."""
        return cls(name, None, bound, False, why)

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured: {self.why} (bound {self.bound:g})"
        return f"{self.name}: {self.value:.4g} (bound {self.bound:g}, {'ok' if self.ok else 'NOT ok'})"


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with ``--json``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="PATH", help="write figures and rows as JSON")
    return made


def present(title: str, rows: Sequence[Mapping[str, Any]], figures: Sequence[Figure], path: Path | None) -> None:
    """Print rows and figures; write them to ``path``, if given."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for figure in figures:
        console.print(str(figure))
    if path is not None:
        found = {"made": _made(path), "figures": [asdict(f) for f in figures], "rows": list(rows)}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _made(path: Path) -> dict[str, str]:
    """What a page says beside the figures: the command without ``--json``, processor and date."""
    words = [word for word in sys.argv[1:] if word not in ("--json", str(path), f"--json={path}")]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """Its name, as the kernel has it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
