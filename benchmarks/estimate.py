"""What `secateur validate` says a run takes, beside what it takes; and what `validate` takes itself.

    python benchmarks/estimate.py [FILE] [--no-run] [--set KEY=VALUE ...] [--repeats 5] [--json PATH]

Runs the file once, in a home of its own, so that nothing is reused. Per stage the estimated seconds stand beside those
between the moments at which its result was written (wall time: other load lengthens it); CPU time and memory are those
that the kernel counted for the run and what it started: CPU time of all processes together, memory of the largest one.
Figures `estimated_over_taken_...` are that ratio or its inverse, whichever is larger, and must not exceed 2. `validate`
and `import torch, torchvision` run in turn in fresh processes; medians. `validate_over_import_rss` may be 1.15.
`validate_cpu_s` may be half of the 5.3 CPU-seconds that pipeline/runs/digits.yaml took when MLflow was still imported:
a bound for that file only, on a machine with nothing else to do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "pipeline" / "runs" / "digits.yaml"
FACTOR = 2.0
MAX_CPU_S = 2.65
MAX_RSS_RATIO = 1.15
STAGES = ("Baseline", "Search", "Fine-tune", "Export", "Benchmark", "Gate", "Report", "Register", "Promote")
"""In the order in which their results are written."""


@dataclass(frozen=True)
class Taken:
    """What a process took, with all that it waited for."""

    wall_s: float
    cpu_s: float
    rss_bytes: int
    output: str


def taken(command: Sequence[str], home: Path) -> Taken:
    """Run a command in a fresh process.

    Raises:
        SystemExit: it fails; shows what it said.
    """
    environment = {**os.environ, "SECATEUR_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as file:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read()
    if process.returncode not in (0, 1) or "Traceback" in output:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    return Taken(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output)


def secateur(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "secateur", *arguments]


def stage_seconds(directory: Path, started: float) -> dict[str, float]:
    """Wall time of each stage: between the moments at which results were written; the first has the start in it."""
    moments = sorted(file.stat().st_mtime for file in (directory / "stages").iterdir() if file.is_file())
    return {stage: end - begin for stage, begin, end in zip(STAGES, [started, *moments], moments, strict=False)}


def ratio_figure(name: str, estimated: float, found: float) -> Figure:
    """The ratio of an estimate to what was found, or its inverse: whichever is larger."""
    ratio = estimated / found
    worse = max(ratio, 1 / ratio)
    return Figure(f"estimated_over_taken_{name}{'' if ratio >= 1 else '_inverse'}", worse, FACTOR, worse <= FACTOR)


def run_beside(file: str, changes: Sequence[str], home: Path) -> tuple[list[dict[str, Any]], list[Figure]]:
    """Estimate a run file, run it, compare."""
    estimate = json.loads(taken(secateur("validate", file, *changes, "--json"), home).output)["estimate"]
    if estimate is None:
        sys.exit(f"{file} has faults; see `secateur validate {file}`")
    started = time.time()
    run = taken(secateur("run", file, *changes), home)
    (directory,) = (home / "runs").iterdir()
    seconds = stage_seconds(directory, started)
    told = {part["stage"]: part["seconds"] for part in estimate["parts"]}
    pairs: Mapping[str, tuple[float, float]] = {
        "Start and baseline": (told["Start"] + told["Baseline"], seconds["Baseline"]),
        **{stage: (told[stage], seconds[stage]) for stage in ("Search", "Fine-tune", "Export", "Benchmark", "Gate")},
        "Report and register": (told["Report and register"], seconds["Report"] + seconds["Register"]),
    }
    rows = [
        {"stage": stage, "estimated_s": a, "wall_s": b, "ratio": a / max(b, 1e-9)} for stage, (a, b) in pairs.items()
    ]
    rows.append(
        {
            "stage": "whole run",
            "estimated_s": estimate["seconds"],
            "wall_s": run.wall_s,
            "ratio": estimate["seconds"] / run.wall_s,
        }
    )
    figures = [
        ratio_figure("wall_s", estimate["seconds"], run.wall_s),
        ratio_figure("cpu_s", estimate["cpu_seconds"], run.cpu_s),
        ratio_figure("memory", estimate["memory_bytes"], run.rss_bytes),
    ]
    print(
        f"run: {run.wall_s:.1f} s, {run.cpu_s:.1f} CPU-seconds, {run.rss_bytes / 2**20:.0f} MiB; estimated: "
        f"{estimate['seconds']} s, {estimate['cpu_seconds']} CPU-seconds, {estimate['memory_bytes'] / 2**20:.0f} MiB"
    )
    return rows, figures


def validate_beside_import(
    file: str, changes: Sequence[str], home: Path, repeats: int
) -> tuple[list[dict[str, Any]], list[Figure]]:
    """What `validate` takes, with and without the estimate, beside importing torch and torchvision."""
    commands = {
        "validate": secateur("validate", file, *changes),
        "validate --no-estimate": secateur("validate", file, *changes, "--no-estimate"),
        "import torch, torchvision": [sys.executable, "-c", "import torch, torchvision"],
    }
    found: dict[str, list[Taken]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            found[name].append(taken(command, home))
    rows = [
        {
            "process": name,
            "cpu_s": statistics.median(each.cpu_s for each in some),
            "least_cpu_s": min(each.cpu_s for each in some),
            "rss_mib": statistics.median(each.rss_bytes for each in some) / 2**20,
        }
        for name, some in found.items()
    ]
    for row in rows:
        row["cpu_over_import"] = row["cpu_s"] / rows[2]["cpu_s"]  # other load lengthens both
    cpu, rss = rows[0]["cpu_s"], rows[0]["rss_mib"] / rows[2]["rss_mib"]
    figures = [
        Figure("validate_cpu_s", cpu, MAX_CPU_S, cpu <= MAX_CPU_S),
        Figure("validate_over_import_rss", rss, MAX_RSS_RATIO, rss <= MAX_RSS_RATIO),
    ]
    return rows, figures


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("file", nargs="?", default=str(RUN_FILE), help="the run file (default: digits.yaml)")
    arguments.add_argument("--no-run", action="store_true", help="only what validate takes")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of it")
    arguments.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    options = arguments.parse_args()
    changes = [part for change in options.set for part in ("--set", change)]
    rows: list[dict[str, Any]] = []
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_run:
            rows, figures = run_beside(options.file, changes, Path(folder) / "run")
            present(f"{Path(options.file).name}: estimated, taken", rows, [], None)
        light, more = validate_beside_import(options.file, changes, Path(folder) / "validate", options.repeats)
    present(f"Fresh processes, {options.repeats} of each", light, [*figures, *more], None)
    if options.json is not None:
        found = {"figures": [asdict(figure) for figure in [*figures, *more]], "rows": [*rows, *light]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
