"""``secateur run``, ``resume`` and ``finish``: a run from its first stage to the last one, begun or continued."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import children, errors
from secateur.pipeline.cli import completers, interrupts, outcome
from secateur.pipeline.cli.options import Debug, Json, Quiet, Trust
from secateur.pipeline.cli.trust import consented
from secateur.pipeline.surroundings import home
from secateur.pipeline.terminal import command, err, one_line, out

if TYPE_CHECKING:
    from secateur.pipeline.progress import ProgressView

SET_HELP = (
    "Override a value of the run file, e.g. --set search.method=random "
    "(another method starts with its own default options)."
)
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP, autocompletion=completers.overrides)
]


def run(
    file: Annotated[Path, typer.Argument(help="The run file (YAML); examples are in pipeline/runs/.")],
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would do and take: stages, evaluations, minutes.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Run a run file from the baseline to the registered, device-timed compact model.

    `secateur init` writes a run file for your data, `secateur validate` checks one.

    Example: secateur run pipeline/runs/digits.yaml --set search.target.macs_ratio=0.5

    Example: secateur run pipeline/runs/digits.yaml --dry-run
    """
    from secateur.pipeline.config.reading import load_run_file

    if dry_run:
        plan(file, set_ or [], json_, quiet, trust)
        return
    config = consented(lambda: load_run_file(file, set_ or []), file, trust)
    from secateur.pipeline.run.run import create_run_directory

    directory = create_run_directory(config)
    _execute_new(directory, file, debug, json_, quiet)


def resume(
    run_dir: Annotated[
        Path,
        typer.Argument(help="The run directory printed by `secateur run`.", autocompletion=completers.run_directories),
    ],
    json_: Json = False,
    quiet: Quiet = False,
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
    _execute(directory, debug, json_, quiet)


def finish(
    run_dir: Annotated[
        Path, typer.Argument(help="A run directory; it is left as it is.", autocompletion=completers.run_directories)
    ],
    candidate: Annotated[int | None, typer.Option(min=0, help="Number of a candidate of its search.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan, as `secateur rescore` writes it.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
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
    _execute_new(begin(directory, candidate, given), directory / "run.yaml", debug, json_, quiet)


def _execute_new(directory: Path, file: Path, debug: bool, as_json: bool, quiet: bool) -> None:
    """Execute a run in a directory just made, which is removed where the run does not even begin.

    Args:
        file: the run file that its user knows.
    """
    try:
        _execute(directory, debug, as_json, quiet)
    except Exception as error:
        from secateur.pipeline.config.faults import FaultsError

        if not (directory / "journal.jsonl").exists():
            interrupts.current.go_on = ""
            shutil.rmtree(directory)
            if isinstance(error, FaultsError):
                raise FaultsError(str(file), error.faults) from error
        raise


def _execute(directory: Path, debug: bool, as_json: bool, quiet: bool) -> None:
    from secateur.pipeline.flow import UndeliveredError, execute, logged, runtime_env
    from secateur.pipeline.run.run import Run
    from secateur.pipeline.tracking import redacted

    runtime_env(directory, debug)
    interrupts.current.go_on = command("secateur", "resume", directory)
    try:
        with children.kept(home(), f"run {directory.name}"), Run(directory, logged(progress(quiet))) as opened:
            if not quiet:
                err.print(f"Run directory: {one_line(directory)}")
            config = opened.config
            facts = execute(opened, debug)
            uri = redacted(opened.tracker.uri)
    except UndeliveredError as left:
        if as_json:
            out.data(outcome.document(left.facts, config, directory, ""))
        else:
            outcome.show(left.facts, config, directory, "")
        raise errors.SurroundingsError(
            f"{left}\nThe model is not registered yet; run: {command('secateur', 'resume', directory)}"
        ) from left
    if as_json:
        out.data(outcome.document(facts, config, directory, uri))
    else:
        outcome.show(facts, config, directory, uri)
    decisions = facts.promote.devices.values() if facts.promote else ()
    refused = any(decision.outcome == "refused" for decision in decisions)
    if refused or not facts.gate.passed:
        raise typer.Exit(errors.EXIT_GATE)


def progress(quiet: bool) -> ProgressView:
    """Where a command shows how far it is: on stderr, or nowhere."""
    from secateur.pipeline.progress import RichProgress, Silent

    return Silent() if quiet else RichProgress(err)


def plan(file: Path, overrides: list[str], as_json: bool, quiet: bool, trust: bool) -> None:
    """Tell what a run would do and take, and begin nothing.

    Raises:
        FaultsError: what the run file asks for is not possible; lists everything.
        Exit: the same, told as JSON.
    """
    from secateur.pipeline.cli.validate import document, show_plan
    from secateur.pipeline.config.faults import FaultsError
    from secateur.pipeline.config.reading import load_run_file

    config = consented(lambda: load_run_file(file, overrides), file, trust)
    from secateur.pipeline.run.estimate import estimate
    from secateur.pipeline.run.preflight import examine
    from secateur.pipeline.workloads.data.content import Reading

    preflight = examine(config, Reading(progress(quiet), "sample"), tracking=True)
    taken = estimate(preflight)
    if as_json:
        out.data(document(file, preflight, taken))
        if preflight.faults:
            raise typer.Exit(errors.EXIT_USER)
    elif taken is None:
        raise FaultsError(str(file), preflight.faults)
    else:
        show_plan(preflight, taken)
