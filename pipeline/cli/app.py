"""The command line: ``secateur`` (also ``python -m pipeline``). Heavy libraries are imported inside the commands."""

from __future__ import annotations

import shutil
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipeline import children, errors
from pipeline.cli import deploy as deploy_cli
from pipeline.cli import devices as devices_cli
from pipeline.cli import interrupts
from pipeline.cli import registry as registry_cli
from pipeline.cli import trust as trust_cli
from pipeline.cli import validate as validate_cli
from pipeline.cli.texts import make_logs_harmless
from pipeline.cli.trust import Trust
from pipeline.foreign import exit_code as exit_code
from pipeline.foreign import expected
from pipeline.surroundings import home, prepare
from pipeline.terminal import command, err, one_line, out, table, use_any_encoding

app = typer.Typer(
    name="secateur",
    help="Prune a PyTorch vision model until it fits a device: searched, tuned, exported, timed there, registered.",
    epilog="Exit codes: 0 done and the gate passed; 1 a bug; 2 a mistake in the input; 3 done, the gate did not pass; "
    "4 disk, device or tracking server failed (resume continues); 130 interrupted, 143 ended by SIGTERM (both: resume "
    "continues).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(devices_cli.app, name="devices")
app.command(name="benchmark")(devices_cli.benchmark)
for registered_ in (registry_cli.pull, registry_cli.promote, registry_cli.rollback, registry_cli.history):
    app.command()(registered_)
app.command()(validate_cli.validate)
app.command()(deploy_cli.deploy)
app.command()(trust_cli.trust)
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and Prefect's log.")]
SET_HELP = (
    "Override a value of the run file, e.g. --set search.method=random "
    "(another method starts with its own default options)."
)
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The run file (YAML); examples are in pipeline/runs/.")],
    set_: Overrides = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Run a run file from the baseline to the registered, device-timed compact model.

    Example: secateur run pipeline/runs/digits.yaml --set search.target.macs_ratio=0.5
    """
    from pipeline.config.reading import load_run_file

    config = load_run_file(file, set_ or [])
    trust_cli.consent(config, file, trust)
    from pipeline.run.run import create_run_directory

    directory = create_run_directory(config)
    _execute_new(directory, debug)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="The run directory printed by `secateur run`.")],
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Continue a run that was killed, interrupted or cut off: finished work is not done again.

    Also delivers candidates and the model to a tracking server that was away.
    """
    from pipeline.run.origin import return_to_origin

    directory = run_dir.absolute()
    return_to_origin(directory)
    from pipeline.run.run import open_run_directory

    trust_cli.consent(open_run_directory(directory)[1], directory / "run.yaml", trust)
    _execute(directory, debug)


@app.command()
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
    from pipeline.run.origin import return_to_origin

    given, directory = None if plan is None else plan.absolute(), run_dir.absolute()
    return_to_origin(directory)
    from pipeline.lifecycle.finish import begin
    from pipeline.run.run import open_run_directory

    trust_cli.consent(open_run_directory(directory)[1], directory / "run.yaml", trust)
    _execute_new(begin(directory, candidate, given), debug)


@app.command(name="rescore")
def rescore_(
    run_dir: Annotated[Path, typer.Argument(help="The run directory printed by `secateur run`.")],
    reward: Annotated[
        str, typer.Option(help="The reward to rank by: device, rewarded_v2, mnasnet, tunas_abs, amc ...")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the reward, e.g. alpha=1.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many candidates to show and keep.")] = 10,
) -> None:
    """Rank a run's candidates by another reward, from its journal: nothing is evaluated again.

    Example: secateur rescore .secateur/runs/digits-... --reward mnasnet --set target_ratio=0.7
    """
    from pipeline.config.reading import reward_options
    from pipeline.lifecycle.rescore import mixed, rescore, shown, write_ranking

    options = reward_options(reward, set_ or [])
    ranking = rescore(run_dir, reward, options)
    numbers = ("accuracy", "MACs ratio", "latency ratio", "reward")
    rows = table("", "candidate", "weights", *numbers, "", title=f"{run_dir.name} by reward {reward}", right=numbers)
    for row in shown(ranking, top):
        rows.add_row(*row)
    out.print(rows)
    if mixed(ranking, top):
        out.print(
            "Note: candidates as cut stand beside fine-tuned ones, whose accuracy has had training since; compare each "
            "with its kind."
        )
    file = write_ranking(run_dir, reward, options, ranking, top)
    out.print(f"Written: {one_line(file)} and the winner's plan, {file.with_suffix('.plan.json').name}")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="methods|workloads|devices", help="What to list.")],
) -> None:
    """List the search methods, workloads or device profiles a run file can name."""
    rows = table(what.removesuffix("s"), "description", box=None, header_style="bold")
    for name, text in _listing(what).items():
        rows.add_row(name, text)
    out.print(rows)


@app.command()
def explain(
    method: Annotated[str, typer.Argument(help="A search method; `secateur list methods` names them.")],
) -> None:
    """Explain a search method: its source, its steps, where we chose, and every option with its default."""
    import inspect
    from dataclasses import fields

    from device_profiles import plain_yaml
    from pruning.search import METHODS

    try:
        module = METHODS.load(method)
    except ValueError as error:
        raise errors.UserError(str(error)) from error
    defaults = {field.name: getattr(module.Options(), field.name) for field in fields(module.Options)}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    section = {"search": {"method": method, "options": options}}
    for text in (inspect.getdoc(module), plain_yaml.dump(section), inspect.getdoc(module.Options)):
        out.print(f"{text}\n")


def _listing(what: str) -> dict[str, str]:
    match what:
        case "methods":
            from pruning.search import METHODS

            return METHODS.descriptions()
        case "workloads":
            from pipeline.config.choices import WORKLOADS

            return WORKLOADS.descriptions()
        case "devices":
            return devices_cli.descriptions()
    raise errors.UserError(f"cannot list {what!r}; choose methods, workloads or devices")


def _execute_new(directory: Path, debug: bool) -> None:
    """Execute a run in a directory just made, which is removed where the run is refused before it begins."""
    err.print(f"Run directory: {one_line(directory)}")
    try:
        _execute(directory, debug)
    except errors.UserError:
        if not (directory / "journal.jsonl").exists():
            shutil.rmtree(directory)
        raise


def _execute(directory: Path, debug: bool) -> None:
    from pipeline.flow import UndeliveredError, execute, runtime_env
    from pipeline.progress import RichProgress
    from pipeline.run.run import Run
    from pipeline.tracking import shown

    runtime_env(directory, debug)
    interrupts.current.go_on = command("secateur", "resume", directory)
    try:
        with children.kept(home(), f"run {directory.name}"), Run(directory, RichProgress(err)) as opened:
            facts = execute(opened, debug)
            uri = shown(opened.tracker.uri)
    except UndeliveredError as left:
        _show(left.facts, directory, "")
        raise errors.SurroundingsError(
            f"{left}\nThe model is not registered yet; run: {command('secateur', 'resume', directory)}"
        ) from left
    _show(facts, directory, uri)
    decisions = facts.get("promote", {}).get("devices", {}).values()
    refused = any(decision["outcome"] == "refused" for decision in decisions)
    if refused or not facts["judge"]["passed"]:
        raise typer.Exit(errors.EXIT_GATE)


def _show(facts: Any, directory: Path, tracking_uri: str) -> None:
    """The final table, and what to do next."""
    from pipeline.report import final_table, registered

    numbers = ("baseline", "compact", "change")
    rows = table("", *numbers, title=f"{directory.name} on device {facts['benchmark']['device']}", right=numbers)
    for row in final_table(facts):
        rows.add_row(*row)
    out.print(rows)
    failed = [c for c in facts["judge"]["checks"] if not c["ok"]]
    for check in failed:
        found = "unknown" if check["value"] is None else f"{check['value']:.4g}"
        out.print(f"Gate: {check['name']} is {found}, must be {check['relation']} {check['bound']:.4g}")
    if not failed:
        out.print(f"Gate: passed ({len(facts['judge']['checks'])} checks)")
    for line in registered(facts):
        out.print(line)
    out.print(f"Report: {one_line(directory / facts['report']['html'])}")
    if tracking_uri:
        out.print("Next:")
        if tracking_uri.startswith("http"):
            out.print(f"  see every candidate: {tracking_uri}")
        else:
            out.print(f"  {command('mlflow', 'ui', '--backend-store-uri', tracking_uri)}")
        out.print(f"  {command('secateur', 'run', directory / 'run.yaml', '--set', 'seed=1')}")
        out.print(f"  {command('secateur', 'list', 'methods')}")


def main() -> NoReturn:
    """Perform a command; turns expected errors into one message and an exit code."""
    debug = "--debug" in sys.argv
    use_any_encoding()
    make_logs_harmless()
    try:
        prepare()
        children.sweep(home())
        sys.exit(app(standalone_mode=False) or errors.EXIT_OK)
    except typer.TyperException as error:  # a mistake in the command itself
        if interrupts.current.stopping:
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(errors.EXIT_USER)
    except Exception as error:
        if interrupts.current.stopping:  # whatever it is, it comes from the end that was asked for
            raise
        if debug:
            err.print(errors.masked(traceback.format_exc()))
        meant = expected(error)
        if meant is None:
            err.labelled("Bug", "bold red", f"{type(error).__name__}: {errors.masked(str(error))}")
            err.print("Please report it with the traceback that --debug shows; `secateur resume` can continue the run.")
        else:
            err.labelled("Error", "bold red", errors.masked(str(meant)))
        sys.exit(exit_code(error))
