"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.pipeline.cli import completers

TRUST_HELP = "Consent to the code that the run file or device profile names, as `secateur trust` does."
Trust = Annotated[bool, typer.Option("--trust", help=TRUST_HELP)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and Prefect's log.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the run file.", autocompletion=completers.overrides
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
