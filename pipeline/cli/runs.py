"""``secateur runs``: which runs there are, how far each is, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.device_profiles.wording import number_of
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.options import Json
from secateur.pipeline.terminal import command, one_line, out

if TYPE_CHECKING:
    from secateur.pipeline.lifecycle.overview import Overview

app = typer.Typer(name="runs", help="The runs in SECATEUR_HOME: list them, show one.", no_args_is_help=True)


@app.command(name="list")
def list_(json_: Json = False) -> None:
    """List all runs, the newest first: how far each is, and what came of it.

    Example: secateur runs list
    """
    from secateur.pipeline.lifecycle.overview import overviews
    from secateur.pipeline.surroundings import home

    runs = overviews(home())
    if json_:
        out.data([run.to_dict() for run in runs])
        return
    if not runs:
        out.print(f"No runs in {one_line(home())}; begin one: secateur init, then secateur run")
        return
    rows: list[tuple[str, ...]] = [("run", "status", "method", "device", "accuracy", "change", "MACs", "speed-up")]
    for run in runs:
        told = run.to_dict()
        rows.append((run.name, run.status, str(told["method"] or "-"), str(told["device"] or "-"), *_figures(told)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):  # no table: a name that is folded cannot be copied
        line = "  ".join(f"{one_line(cell):<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        out.print(line, style=None if i else "bold")


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run directory, or the beginning of a run's name.",
            autocompletion=completers.run_names,
        ),
    ],
    json_: Json = False,
) -> None:
    """Show one run: its figures, its gate, its files, and how to go on.

    Example: secateur runs show digits-resnet20
    """
    from secateur.pipeline.lifecycle.overview import named, num_candidates, overview
    from secateur.pipeline.surroundings import home

    run = overview(named(home(), name))
    candidates = num_candidates(run.directory)
    if json_:
        out.data({**run.to_dict(), "candidates": candidates})
    else:
        _show(run, candidates)


def _show(run: Overview, candidates: int) -> None:
    told = run.to_dict()
    out.print(f"{run.name}: {run.status}, begun {run.begun}")
    out.print(
        f"{told['model']} ({told['workload']}), {told['method']} for device {told['device']}; "
        f"{number_of(candidates, 'candidate(s)')}"
    )
    if told["models"]:
        accuracy, drop, macs, speedup = _figures(told)
        out.print(f"{told['metric']} {accuracy} ({drop}), MACs {macs}, speed-up {speedup}")
    for check in told["checks"] or ():
        if not check["ok"]:
            value = "unknown" if check["value"] is None else f"{check['value']:.4g}"
            out.print(f"Gate: {check['name']} is {value}, must be {check['relation']} {check['bound']:.4g}")
    out.print(f"Directory: {one_line(run.directory)}")
    if (run.directory / "report.html").is_file():
        out.print(f"Report: {one_line(run.directory / 'report.html')}")
    if run.status == "stopped":
        out.print(f"Next: {command('secateur', 'resume', run.directory)}")
    elif run.status in ("passed", "not passed"):
        out.print(f"Next: {command('secateur', 'rescore', run.directory, '--reward', 'mnasnet')}")


def _figures(told: dict[str, Any]) -> tuple[str, str, str, str]:
    """Accuracy, its change, share of the MACs and speed-up; dashes where a run has none yet."""
    models, metric, speedup = told["models"], told["metric"], told["speedup"]
    if not models:
        return "-", "-", "-", "-"
    base, compact = models["baseline"], models["compact"]
    before, after = base.get(metric), compact.get(metric)
    known = before is not None and after is not None
    accuracy, change = (f"{after:.2%}", f"{100 * (after - before):+.2f} pp") if known else ("-", "-")
    return accuracy, change, f"{compact['macs'] / base['macs']:.1%}", "-" if speedup is None else f"{speedup:.2f}x"
