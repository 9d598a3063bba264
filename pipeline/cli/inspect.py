"""``secateur list`` and ``explain``: what a run file can name, told without importing it."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.terminal import out, table


def list_(
    what: Annotated[str, typer.Argument(metavar="methods|workloads|devices", help="What to list.")],
) -> None:
    """List the search methods, workloads or device profiles a run file can name."""
    rows = table(what.removesuffix("s"), "description", box=None, header_style="bold")
    for name, text in listing(what).items():
        rows.add_row(name, text)
    out.print(rows)


def explain(
    method: Annotated[str, typer.Argument(help="A search method; `secateur list methods` names them.")],
) -> None:
    """Explain a search method: its source, its steps, where we chose, and every option with its default."""
    import inspect
    from dataclasses import fields

    from secateur.device_profiles import plain_yaml
    from secateur.pruning.search import METHODS

    try:
        module = METHODS.load(method)
    except ValueError as error:
        raise errors.UserError(str(error)) from error
    defaults = {field.name: getattr(module.Options(), field.name) for field in fields(module.Options)}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    section = {"search": {"method": method, "options": options}}
    for text in (inspect.getdoc(module), plain_yaml.dump(section), inspect.getdoc(module.Options)):
        out.print(f"{text}\n")


def listing(what: str) -> dict[str, str]:
    """Name -> description of everything of one kind.

    Raises:
        UserError: there is no such kind.
    """
    match what:
        case "methods":
            from secateur.pruning.search import METHODS

            least = METHODS.stated("Least budget")
            return {
                name: f"{text} Least budget: {least.get(name, '1 evaluation')}."
                for name, text in METHODS.descriptions().items()
            }
        case "workloads":
            from secateur.pipeline.config.choices import WORKLOADS

            return WORKLOADS.descriptions()
        case "devices":
            from secateur.pipeline.cli.devices.listing import descriptions

            return descriptions()
    raise errors.UserError(f"cannot list {what!r}; choose methods, workloads or devices")
