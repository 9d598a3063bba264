"""The command line: ``secateur`` (also ``python -m secateur``). Heavy libraries are imported inside the commands."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, NoReturn

import typer

from secateur import __version__
from secateur.pipeline import children, errors
from secateur.pipeline.cli import (
    check,
    deploy,
    devices,
    doctor,
    init,
    inspect,
    interrupts,
    registry,
    report,
    reproduce,
    results,
    run,
    runs,
    trust,
    validate,
)
from secateur.pipeline.cli.devices import benchmark
from secateur.pipeline.cli.help import completed_words, import_formatter, narrowed
from secateur.pipeline.cli.texts import make_logs_harmless
from secateur.pipeline.surroundings import home, prepare
from secateur.pipeline.terminal import err, out, use_any_encoding

PROGRAM = "secateur"
"""As what it is completed and explained, also as ``python -m secateur``."""


def show_version(wanted: bool) -> None:
    """Print the version, and end.

    Raises:
        Exit: the version was wanted.
    """
    if wanted:
        out.print(f"{PROGRAM} {__version__}")
        raise typer.Exit


app = typer.Typer(
    name=PROGRAM,
    help="Prune a PyTorch vision model until it fits a device: searched, tuned, exported, timed there, registered.",
    epilog="Exit codes: 0 done and the gate passed; 1 a bug; 2 a mistake in the input; 3 done, the gate did not pass; "
    "4 disk, device or tracking server failed (resume continues); 130 interrupted, 143 ended by SIGTERM (both: resume "
    "continues).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print it.")] = False,
) -> None: ...


app.add_typer(devices.app, name="devices")
app.add_typer(runs.app, name="runs")
for command_ in (
    *(benchmark.benchmark, registry.pull, registry.promote, registry.rollback, registry.history),
    *(check.check, validate.validate, deploy.deploy, trust.trust, run.run, run.resume, run.finish),
):
    app.command()(command_)
app.command(name="rescore")(results.rescore_)
app.command()(reproduce.reproduce)
app.command()(reproduce.verify)
app.command(name="results")(reproduce.results_)
app.command()(report.report)
app.command()(report.compare)
app.command(name="list")(inspect.list_)
app.command()(inspect.explain)
app.command()(inspect.schema)
app.command()(doctor.doctor)
app.command()(init.init)


def main() -> NoReturn:
    """Perform a command; turns expected errors into one message and an exit code.

    Raises:
        TyperException: a mistake in the command, where a signal has come and ends the process anyway.
        Exception: any other one, likewise.
    """
    debug = "--debug" in sys.argv
    use_any_encoding()
    make_logs_harmless()
    if "--help" in sys.argv:
        import_formatter()
    try:
        prepare()
        children.sweep(home())
        program = narrowed(app, [*sys.argv[1:], *completed_words()])
        sys.exit(program(prog_name=PROGRAM, standalone_mode=False) or errors.EXIT_OK)
    except typer.TyperException as error:  # a mistake in the command itself
        if interrupts.current.stopping:
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(errors.EXIT_USER)
    except Exception as error:
        if interrupts.current.stopping:  # whatever it is, it comes from the end that was asked for
            raise
        from secateur.pipeline.foreign import exit_code, expected

        if debug:
            err.print(errors.masked(traceback.format_exc()))
        meant = expected(error)
        if meant is None:
            err.labelled("Bug", "bold red", f"{type(error).__name__}: {errors.masked(str(error))}")
            err.print(
                "Please report it with the traceback that --debug shows and what `secateur doctor --json` prints."
            )
        else:
            err.labelled("Error", "bold red", errors.masked(str(meant)))
        code, go_on = exit_code(error), interrupts.current.go_on
        if code != errors.EXIT_USER and go_on and go_on not in str(meant):
            err.print(f"Nothing is lost. Continue with: {go_on}")
        sys.exit(code)
