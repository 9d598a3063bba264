"""``secateur reproduce``, ``verify`` and ``results``: published claims repeated, checked by anybody, and shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli import interrupts
from secateur.pipeline.cli.options import Json, Trust
from secateur.pipeline.terminal import command, err, one_line, out, table

ProfileName = Literal["cpu", "gpu"]
Results = Annotated[Path, typer.Option("--results", help="Folder of the results, also of what is paused.")]


def reproduce(
    row: Annotated[str | None, typer.Argument(metavar="ROW|all", help="A row; --list shows all.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only show the rows, and what is done of each.")] = False,
    profile: Annotated[ProfileName, typer.Option(help="For which machine the run files are taken.")] = "cpu",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Seeds of each unit, from 0; those of the row unless given.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0.001, max=10_000, help="Hours until work is paused.")] = 1.0,
    results: Results = Path("results"),
) -> None:
    """Repeat published claims: every unit is a run, worked on in pieces of at most an hour, on one machine or several.

    What is not finished when the budget is spent leaves its state in the results, and the same command goes on from
    there; a finished unit leaves its compact model and its facts. Several calls in one home share the work. `secateur
    verify` checks what is finished, `secateur results` writes the page.

    Example: secateur reproduce --list

    Example: secateur reproduce filter-ensembles-mlp --seeds 5 --budget 2
    """
    from secateur.pipeline.lifecycle.rows import row_names, units_of

    if list_:
        _list(row_names(), results)
        return
    if row is None:
        raise errors.UserError("name a row, or all; `secateur reproduce --list` shows them")
    names = row_names() if row == "all" else [row]
    units = [unit for name in names for unit in units_of(name, profile, seeds)]
    from secateur.pipeline.lifecycle.reproduce import Budget, is_finished
    from secateur.pipeline.lifecycle.reproduce import reproduce as work

    given = ["--profile", profile, *([] if seeds is None else ["--seeds", seeds]), "--budget", f"{budget:g}"]
    again = command("secateur", "reproduce", row, *given, "--results", results)
    interrupts.current.go_on = again
    work(units, results.absolute(), Budget(time.monotonic() + 3600 * budget), lambda text: err.print(text))
    interrupts.current.go_on = ""
    done = sum(is_finished(unit, results) for unit in units)
    out.print(f"{done} of {len(units)} units are finished" + ("" if done == len(units) else f"; go on with: {again}"))


def _list(names: list[str], results: Path) -> None:
    from secateur.pipeline.lifecycle.results_page import of_row
    from secateur.pipeline.lifecycle.rows import read_row

    rows = table("row", "units", "seeds", "finished", "claim", right=("seeds", "finished"))
    for name in names:
        row, found = read_row(name), of_row(results, name)
        done = sum(len(found[unit]) for unit in row.units)
        missing = f" ({row.not_here})" if row.not_here and not done else ""
        rows.add_row(name, ", ".join(row.units), str(row.seeds), f"{done}{missing}", row.claim)
    out.print(rows)


def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="results, a row's folder or a unit's.")],
    compute: Annotated[
        bool, typer.Option("--compute/--no-compute", help="Whether the models are run on their test images.")
    ] = True,
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Compute again what kept results say: accuracy, MACs, parameters, sha256. Any number that was changed is found.

    An answer may be another one on another processor only where an image's two best classes are nearly equal. The data
    must be here, as the row says (SECATEUR_DATA). Exit code 0 only if everything agrees, else 3.

    Example: secateur verify results

    Example: secateur verify results/filter-ensembles-mlp/uniform-s0
    """
    from secateur.pipeline.cli.trust import consented
    from secateur.pipeline.lifecycle.verify import unit_folders
    from secateur.pipeline.lifecycle.verify import verify as check

    found = []
    for folder in unit_folders(folders):
        found.append(one := check(folder, lambda load, file: consented(load, file, trust), computing=compute))
        if not json_:
            out.print(f"{one_line(folder)}: {'differs' if one.faults else 'agrees'}")
            for text in (*one.faults, *one.notes):
                out.print(f"  {text}")
    wrong = sum(bool(one.faults) for one in found)
    if json_:
        units = [{"folder": str(o.folder), "faults": list(o.faults), "notes": list(o.notes)} for o in found]
        out.data({"format": 1, "agrees": not wrong, "units": units})
    elif wrong:
        out.print(f"DIFFERS: {wrong} of {len(found)} units do not agree with what they say")
    else:
        computed = "computed again" if compute else "not computed again"
        out.print(f"VERIFIED: {len(found)} units agree with what they say; accuracies were {computed}")
    if wrong:
        raise typer.Exit(errors.EXIT_GATE)


def results_(
    folder: Annotated[Path, typer.Argument(help="The folder of the results.")] = Path("results"),
    write: Annotated[Path | None, typer.Option(help="File for the page; it is printed unless given.")] = None,
) -> None:
    """Show what came of published claims, as a page of Markdown made from the facts.

    Example: secateur results results --write docs/results.md
    """
    from secateur.pipeline.files import write_whole
    from secateur.pipeline.lifecycle.results_page import page

    text = page(folder)
    if write is None:
        out.print(text)
    else:
        write_whole(write, text)
        out.print(f"Written: {one_line(write)}")
