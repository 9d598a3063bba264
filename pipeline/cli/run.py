"""``secateur run``, ``resume`` and ``finish``: a run from its first stage to the last one, begun or continued."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import children, errors
from secateur.pipeline.cli import interrupts
from secateur.pipeline.cli.options import Debug, Trust
from secateur.pipeline.cli.trust import consented
from secateur.pipeline.surroundings import home
from secateur.pipeline.terminal import command, err, one_line, out, table

if TYPE_CHECKING:
    from secateur.pipeline.run.facts import Facts

SET_HELP = (
    "Override a value of the run file, e.g. --set search.method=random "
    "(another method starts with its own default options)."
)
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]


def run(
    file: Annotated[Path, typer.Argument(help="The run file (YAML); examples are in pipeline/runs/.")],
    set_: Overrides = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Run a run file from the baseline to the registered, device-timed compact model.

    Example: secateur run pipeline/runs/digits.yaml --set search.target.macs_ratio=0.5
    """
    from secateur.pipeline.config.reading import load_run_file

    config = consented(lambda: load_run_file(file, set_ or []), file, trust)
    from secateur.pipeline.run.run import create_run_directory

    directory = create_run_directory(config)
    _execute_new(directory, debug)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="The run directory printed by `secateur run`.")],
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Continue a run that was killed, interrupted or cut off: finished work is not done again.

    Also delivers candidates and the model to a tracking server that was unreachable.
    """
    from secateur.pipeline.run.origin import return_to_origin

    directory = run_dir.absolute()
    return_to_origin(directory)
    from secateur.pipeline.run.run import open_run_directory

    consented(lambda: open_run_directory(directory)[1], directory / "run.yaml", trust)
    _execute(directory, debug)


def finish(
    run_dir: Annotated[Path, typer.Argument(help="A run directory; it is left as it is.")],
    candidate: Annotated[int | None, typer.Option(min=0, help="Number of a candidate of its search.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan, as `secateur rescore` writes it.")] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Take another plan of a run to the end, as a run of its own: fine-tuned, exported, timed, judged, registered.

    Example: secateur finish .secateur/runs/digits-... --plan .secateur/runs/digits-.../rescore-mnasnet.plan.json
    """
    from secateur.pipeline.run.origin import return_to_origin

    given, directory = None if plan is None else plan.absolute(), run_dir.absolute()
    return_to_origin(directory)
    from secateur.pipeline.lifecycle.finish import begin
    from secateur.pipeline.run.run import open_run_directory

    consented(lambda: open_run_directory(directory)[1], directory / "run.yaml", trust)
    _execute_new(begin(directory, candidate, given), debug)


def _execute_new(directory: Path, debug: bool) -> None:
    """Execute a run in a directory just made, which is removed where the run is refused before it begins."""
    interrupts.current.go_on = command("secateur", "resume", directory)  # before the user can know of it
    err.print(f"Run directory: {one_line(directory)}")
    try:
        _execute(directory, debug)
    except errors.UserError:
        if not (directory / "journal.jsonl").exists():
            shutil.rmtree(directory)
        raise


def _execute(directory: Path, debug: bool) -> None:
    from secateur.pipeline.flow import UndeliveredError, execute, runtime_env
    from secateur.pipeline.progress import RichProgress
    from secateur.pipeline.run.run import Run
    from secateur.pipeline.tracking import redacted

    runtime_env(directory, debug)
    interrupts.current.go_on = command("secateur", "resume", directory)
    try:
        with children.kept(home(), f"run {directory.name}"), Run(directory, RichProgress(err)) as opened:
            facts = execute(opened, debug)
            uri = redacted(opened.tracker.uri)
    except UndeliveredError as left:
        _show(left.facts, directory, "")
        raise errors.SurroundingsError(
            f"{left}\nThe model is not registered yet; run: {command('secateur', 'resume', directory)}"
        ) from left
    _show(facts, directory, uri)
    decisions = facts.promote.devices.values() if facts.promote else ()
    refused = any(decision.outcome == "refused" for decision in decisions)
    if refused or not facts.gate.passed:
        raise typer.Exit(errors.EXIT_GATE)


def _show(facts: Facts, directory: Path, tracking_uri: str) -> None:
    """The final table, and what to do next."""
    from secateur.pipeline.report import final_table, registered, went_by

    numbers = ("baseline", "compact", "change")
    rows = table("", *numbers, title=f"{directory.name} on device {facts.benchmark.device}", right=numbers)
    for row in final_table(facts):
        rows.add_row(*row)
    out.print(rows)
    for check in facts.gate.failed:
        value = "unknown" if check.value is None else f"{check.value:.4g}"
        out.print(f"Gate: {check.name} is {value}, must be {check.relation} {check.bound:.4g}")
    if facts.gate.passed:
        out.print(f"Gate: passed ({len(facts.gate.checks)} checks)")
    out.print(f"Search: {went_by(facts)}")
    for line in registered(facts):
        out.print(line)
    out.print(f"Report: {one_line(directory / facts.report.html)}")
    if tracking_uri:
        out.print("Next:")
        if tracking_uri.startswith("http"):
            out.print(f"  see every candidate: {tracking_uri}")
        else:
            out.print(f"  {command('mlflow', 'ui', '--backend-store-uri', tracking_uri)}")
        out.print(f"  {command('secateur', 'run', directory / 'run.yaml', '--set', 'seed=1')}")
        out.print(f"  {command('secateur', 'list', 'methods')}")
