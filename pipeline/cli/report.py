"""``secateur report`` and ``secateur compare``: pages from what runs have left behind; nothing is measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.options import Json
from secateur.pipeline.terminal import command, one_line, out, table

Which = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL@ALIAS",
        help="A run directory, the beginning of a run's name, or a registered version.",
        autocompletion=completers.run_names,
    ),
]


def report(
    which: Which,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    markdown: Annotated[bool, typer.Option("--md", help="Print the report as Markdown.")] = False,
    json_: Json = False,
) -> None:
    """Make a run's report anew, also of a run that is going on or failed half-way.

    Example: secateur report digits-resnet20 --open
    """
    from secateur.pipeline.report.anew import render

    if markdown and json_:
        raise errors.UserError("give --md or --json, not both")
    made = render(_directory(which))
    if json_:
        out.data(json.loads(made.json.read_text(encoding="utf-8")))
    elif markdown:
        out.print(made.markdown.read_text(encoding="utf-8"), end="")
    else:
        out.print(f"Written: {one_line(made.html)}, {made.json.name} and {made.markdown.name} beside it")
    if open_:
        typer.launch(made.html.absolute().as_uri())


def compare(
    first: Which,
    second: Which,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page that is written.", dir_okay=False)
    ] = Path("compare.html"),
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    json_: Json = False,
) -> None:
    """Two runs, versions or devices side by side, as a table and as a page.

    Example: secateur compare digits-resnet20-20260101 digits-resnet20-20260102 -o compare.html
    """
    from secateur.pipeline.report.anew import compare as compare_

    told = compare_(_directory(first), _directory(second), output)
    if json_:
        out.data({"columns": list(told.titles), "rows": [list(row) for row in told.rows], "file": str(output)})
    else:
        rows = table(*told.titles, title="Side by side")
        for row in told.rows:
            rows.add_row(*row)
        out.print(rows)
        out.print(f"Written: {one_line(output)}")
    if open_:
        typer.launch(output.absolute().as_uri())


def _directory(which: str) -> Path:
    """Of a run, or of the run that made a registered version.

    Raises:
        UserError: there is none here.
    """
    from secateur.pipeline.lifecycle.overview import named
    from secateur.pipeline.surroundings import home

    if "@" not in which or (Path(which) / "run.yaml").is_file():
        return named(home(), which)
    from secateur.pipeline.cli.registry import registry_at, split

    name, alias, device = split(which)
    version = registry_at(None).version(name, alias, device)
    directory = home() / "runs" / (version.run or "-")
    if not (directory / "run.yaml").is_file():
        run = version.run or "a run that it does not name"
        pull = command("secateur", "pull", f"{name}@{version.version}", "--output", name)
        raise errors.UserError(
            f"version {version.version} of {name} was made by {run}, which is not in {home() / 'runs'}; `{pull}` "
            "brings the report it was registered with"
        )
    return directory
