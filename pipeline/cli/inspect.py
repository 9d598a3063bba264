"""``secateur list``, ``explain`` and ``schema``: what a run file can say and name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.options import Json
from secateur.pipeline.terminal import one_line, out, table

if TYPE_CHECKING:
    from secateur.pipeline.config.keys import Key


def list_(
    what: Annotated[
        str, typer.Argument(metavar="methods|workloads|devices", help="What to list.", autocompletion=completers.kinds)
    ],
    json_: Json = False,
) -> None:
    """List the search methods, workloads or device profiles a run file can name.

    Those of installed packages are among them. A file of your own is on no list: `secateur explain FILE.py:NAME` shows
    what a method in it is. `secateur runs list` lists the runs.
    """
    if json_:
        out.data([{"name": name, "description": text} for name, text in listing(what).items()])
        return
    rows = table(what.removesuffix("s"), "description", box=None, header_style="bold")
    for name, text in listing(what).items():
        rows.add_row(name, text)
    out.print(rows)


def explain(
    word: Annotated[
        str,
        typer.Argument(
            metavar="KEY|METHOD",
            help="A key of the run file, with dots, or a search method; FILE.py:NAME for one of your own.",
            autocompletion=completers.explained,
        ),
    ],
) -> None:
    """Explain a key of the run file (meaning, type, default, bounds), or a search method with all its options.

    Example: secateur explain search.latency.max_error

    Example: secateur explain ccep

    The code of a FILE.py:NAME is run: naming it here is your consent, for this once.
    """
    from secateur.device_profiles.shelf import in_file
    from secateur.pruning.search import METHODS

    if in_file(word):
        from secateur.pipeline.config import trust

        trust.allow_typed([trust.method_of_file(word)])
    if METHODS.has(word):
        _explain_method(word)
    else:
        _explain_key(word, METHODS.names())


def _explain_method(name: str) -> None:
    """Print a method's source, its steps, where we chose, and every option with its default."""
    import inspect
    from dataclasses import fields

    from secateur.device_profiles import plain_yaml
    from secateur.pruning.search import METHODS

    try:
        module = METHODS.load(name)
    except ValueError as error:
        raise errors.UserError(str(error)) from error
    defaults = {field.name: getattr(module.Options(), field.name) for field in fields(module.Options)}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    section = {"search": {"method": name, "options": options}}
    for text in (inspect.getdoc(module), plain_yaml.dump(section), inspect.getdoc(module.Options)):
        out.print(f"{text}\n")


def _explain_key(word: str, methods: list[str]) -> None:
    """Print what a key means and takes; of a section, what its keys mean too.

    Raises:
        UserError: there is no such key, or several end in this word.
    """
    from secateur.pipeline.config.json_schema import packaged
    from secateur.pipeline.config.keys import all_keys, keys_at, keys_of, nearest

    keys = keys_of(packaged())
    if not keys_at(word, keys):  # a key of something installed besides, or none
        keys = all_keys()
    meant = keys_at(word, keys)
    places = list(dict.fromkeys(key.place for key in meant))
    if len(places) > 1:
        raise errors.UserError(f"{word!r} is the end of several keys; write one of them: {', '.join(places)}")
    if not meant:
        close = nearest(word, keys, methods)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise errors.UserError(
            f"no key of the run file and no search method is called {word!r}{hint} (docs/reference/run-file.md lists "
            "all keys, `secateur list methods` the methods)"
        )
    for key in meant:
        _show_key(key, "")
    for key in keys:
        if key.place.rpartition(".")[0] == places[0]:
            _show_key(key, "  ")


def _show_key(key: Key, indent: str) -> None:
    default = "required" if key.required else f"default {key.default}" if key.default else ""
    of = f" (of {key.of})" if key.of else ""
    out.print(f"{indent}{key.place}{of}: {'; '.join(filter(None, (key.takes, default)))}")
    out.print(f"{indent}  {key.meaning}")


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there instead of printing it.")
    ] = None,
) -> None:
    """Print the JSON schema of the run file: every key with its meaning, for editors and programs.

    An editor with a YAML language server checks and completes a run file whose first line is
    # yaml-language-server: $schema=FILE

    Example: secateur schema --output run-file.schema.json
    """
    import json

    from secateur.pipeline.config.json_schema import whole

    document = whole()
    if output is None:
        out.data(document)
    else:
        from secateur.pipeline.files import write_whole

        write_whole(output, json.dumps(document, indent=2) + "\n")
        out.print(f"Written: {one_line(output)}")


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
