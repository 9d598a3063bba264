"""The command ``secateur deploy``: schedules on a Prefect server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.pipeline.cli.options import Debug, Overrides, Trust
from secateur.pipeline.cli.trust import consented
from secateur.pipeline.terminal import command, out


def deploy(
    file: Annotated[Path, typer.Argument(help="The run file (YAML).")],
    cron: Annotated[str | None, typer.Option(help="When to run it, e.g. '0 2 * * *'; without: by hand only.")] = None,
    profile_cron: Annotated[str | None, typer.Option(help="When to time the champions again.")] = None,
    promote_cron: Annotated[str | None, typer.Option(help="When to compare challengers with champions.")] = None,
    timezone: Annotated[str, typer.Option(help="Of the schedules.")] = "UTC",
    pool: Annotated[str, typer.Option(help="Work pool (of type process); made where there is none.")] = "secateur",
    name: Annotated[str | None, typer.Option(help="Of the deployments; without: the run file's name.")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Leave the schedules switched off.")] = False,
    set_: Overrides = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Make or update the deployments of a run file on a Prefect server: compress, profile (re-profile) and promote.

    Needs PREFECT_API_URL. Example: secateur deploy pipeline/runs/digits.yaml --cron "0 2 * * *"
    """
    from secateur.pipeline.flow import runtime_env

    runtime_env(debug=debug)
    from secateur.pipeline.config.reading import load_run_file

    consented(lambda: load_run_file(file, set_ or ()), file, trust)
    from secateur.pipeline.flow.deployments import Order, deploy

    crons = {"compress": cron, "profile": profile_cron, "promote": promote_cron}
    order = Order(file, tuple(set_ or ()), crons, name, pool, timezone, paused)
    for line in deploy(order):
        out.print(line)
    out.print("Next:")
    out.print(f"  {command('prefect', 'worker', 'start', '--pool', pool)}")
