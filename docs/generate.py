"""What pages repeat of the code is written by this file, between two comments::

    <!-- generated: keys search -->
    ...
    <!-- end -->

`make generate` writes every page anew; a test compares (`tests/docs/test_generated.py`).
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?P<begin><!-- generated: (?P<call>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
FIGURES = ROOT / "docs" / "figures"
MAKERS: dict[str, Callable[..., str]] = {}


def maker(function: Callable[..., str]) -> Callable[..., str]:
    """Let pages call a function by its name."""
    MAKERS[function.__name__.replace("_", "-")] = function
    return function


def pages() -> list[Path]:
    """Every page that may have generated blocks."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "DECISIONS.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with every generated block as the code has it now.

    Raises:
        KeyError: a block calls what is not there.
    """

    def fresh(block: re.Match[str]) -> str:
        name, *words = shlex.split(block["call"])
        return f"{block['begin']}\n{MAKERS[name](*words).strip()}\n\n{block['end']}"

    return BLOCK.sub(fresh, text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; ``|`` in cells is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


# -- the run file ------------------------------------------------------------------------------------------------------


@cache
def _keys() -> list[Any]:
    from secateur.pipeline.config.json_schema import packaged
    from secateur.pipeline.config.keys import keys_of

    return keys_of(packaged())


@maker
def keys(section: str, *options: str) -> str:
    """The keys below a section: ``keys workload of=detection``, ``keys search without=budget``, ``keys finetune
    only=top``; ``keys .`` = the top level."""
    said = dict(option.split("=") for option in options)
    without, only = (tuple(filter(None, said.get(word, "").split(","))) for word in ("without", "only"))
    prefix = "" if section == "." else f"{section}."

    def wanted(key: Any, name: str) -> bool:
        if not key.place.startswith(prefix) or key.of != said.get("of", ""):
            return False
        if section == ".":
            return "." not in name
        first = name.partition(".")[0]
        return not key.section and first not in without and (first in only or not only)

    names = [(key, key.place.removeprefix(prefix)) for key in _keys()]
    rows = [[f"`{name}`", key.takes, _stated(key), key.meaning] for key, name in names if wanted(key, name)]
    assert rows, f"no key below {section}"
    return table(("key", "takes", "default", "meaning"), rows)


def _stated(key: Any) -> str:
    return "required" if key.required else f"`{key.default}`" if key.default else ""


@maker
def reward_options() -> str:
    """The options of the rewards, with the default in each preset that has them."""
    presets = list(dict.fromkeys(key.of for key in _keys() if key.place.startswith("reward.options.")))
    known: dict[str, dict[str, Any]] = {}
    for key in _keys():
        if key.place.startswith("reward.options."):
            known.setdefault(key.place.rpartition(".")[2], {})[key.of] = key
    rows = []
    for name, of in known.items():
        one = next(iter(of.values()))
        rows.append([f"`{name}`", *(_stated(of[preset]) if preset in of else "" for preset in presets), one.meaning])
    return table(("option", *(f"`{preset}`" for preset in presets), "meaning"), rows)


@maker
def profile_keys(kind: str) -> str:
    """The keys of a device profile or of a part of it, by the name of its class in ``device_profiles/profile.py``."""
    from secateur.device_profiles import profile
    from secateur.pipeline.config.documented import meanings
    from secateur.pipeline.config.keys import takes

    model: Any = getattr(profile, kind)
    said, schema = meanings(model), model.model_json_schema()
    rows = []
    for name, field in schema["properties"].items():
        if "$ref" in field or name == "name":
            continue
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        default = "required" if name in schema.get("required", ()) else default
        rows.append([f"`{name}`", takes({k: v for k, v in field.items() if k != "title"}), default, said.get(name, "")])
    return table(("key", "takes", "default", "meaning"), rows)


# -- the command line --------------------------------------------------------------------------------------------------


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for word, below in sorted(getattr(command, "commands", {}).items()):
        if hasattr(below, "commands"):
            yield from _commands(below, f"{name} {word}")
        else:
            yield f"{name} {word}", below


@maker
def commands() -> str:
    """Every command of the program, with what it takes."""
    import typer

    from secateur.pipeline.cli.app import PROGRAM, app

    return "\n\n".join(_command(name, command) for name, command in _commands(typer.main.get_command(app), PROGRAM))


def _command(name: str, command: Any) -> str:
    arguments = [each for each in command.params if not each.opts[0].startswith("-")]
    options = [each for each in command.params if each.opts[0].startswith("-") and not each.hidden]
    usage = " ".join([name, *map(_placeholder, arguments), *(["[OPTIONS]"] if options else [])])
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    examples = [text.removeprefix("Example: ") for text in paragraphs if text.startswith("Example: ")]
    texts = [" ".join(text.split()) for text in paragraphs if not text.startswith("Example: ")]
    parts = [f"## {name}", "\n\n".join(texts), f"```text\n{usage}\n```"]
    if arguments or options:
        rows = [[f"`{_placeholder(each)}`", each.help or "", ""] for each in arguments]
        rows += [[f"`{_option(each)}`", each.help or "", _default(each)] for each in options]
        parts.append(table(("argument or option", "meaning", "default"), rows))
    if examples:
        parts.append("For example:\n\n```text\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def _placeholder(argument: Any) -> str:
    word = (argument.metavar or argument.name.strip("_").upper()).strip("[]")
    word = f"{word} ..." if argument.nargs == -1 else word
    return word if argument.required else f"[{word}]"


def _option(option: Any) -> str:
    words = ", ".join([*option.opts, *option.secondary_opts])
    return words if option.is_flag else f"{words} {option.metavar or option.name.strip('_').upper()}"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    return "" if value is None or value is False or value == () or callable(value) else f"`{value}`"


# -- errors ------------------------------------------------------------------------------------------------------------


@maker
def exit_codes() -> str:
    """The exit codes, as ``pipeline/errors.py`` has them."""
    from secateur.pipeline import errors

    listed = re.findall(r"^(\d+)\s{2,}(.+)$", errors.__doc__ or "", re.MULTILINE)
    return table(("code", "meaning"), [[code, text.replace("``", "`")] for code, text in listed])


# -- search methods ----------------------------------------------------------------------------------------------------


@maker
def method(name: str) -> str:
    """What a search method's module says of itself, and its options."""
    from secateur.pipeline.config.documented import meanings
    from secateur.pruning.search import METHODS

    module = METHODS.load(name)
    said, defaults = meanings(module.Options), module.Options()
    rows = [
        [f"`{field.name}`", f"`{json.dumps(getattr(defaults, field.name))}`", said.get(field.name, "")]
        for field in fields(module.Options)
    ]
    options = table(("option", "default", "meaning"), rows) if rows else "It has no options."
    return f"{_markdown(inspect.getdoc(module) or '')}\n\n{options}"


@maker
def standing(name: str) -> str:
    """How a method did in ``benchmarks/methods.py``, beside the uniform control; means over seeds."""
    runs = json.loads((ROOT / "docs/reference/methods.json").read_text(encoding="utf-8"))["rows"]

    def row(method: str) -> list[str]:
        of = [each for each in runs if each["method"] == method]
        if not of:
            return [f"`{method}`", *["not run"] * 5]
        mean = {key: sum(each[key] for each in of) / len(of) for key in ("macs_ratio", "tuned", "evaluations", "work")}
        seeds, unpruned = str(len(of)), f"{of[0]['unpruned']:.2f} %"
        share, work = f"{100 * mean['macs_ratio']:.1f} %", f"{mean['work'] / 1e12:.2f} T"
        return [
            f"`{method}`",
            seeds,
            share,
            f"{mean['tuned']:.2f} % (unpruned {unpruned})",
            f"{mean['evaluations']:.0f}",
            work,
        ]

    rows = [row(method) for method in dict.fromkeys((name, "uniform"))]
    head = ("method", "seeds", "MACs kept", "top1 after two epochs", "evaluations", "image-MACs of the search")
    return (
        "On ResNet-20 and CIFAR-10 ([all side by side](../../reference/methods.md), by `benchmarks/methods.py`):\n\n"
        f"{table(head, rows)}"
    )


def _markdown(text: str) -> str:
    """A docstring in Markdown: double backticks are single ones, and what is indented behind ``::`` is a block."""
    parts = []
    for part in re.split(r"\n\n(?=\S)|\n\n(?=    )", text):
        if part.startswith("    "):
            parts.append(f"```text\n{textwrap.dedent(part).strip()}\n```")
        else:
            parts.append(re.sub(r"::$", ":", part.rstrip()).replace("``", "`"))
    return re.sub(r"```\n\n```text\n", "\n", "\n\n".join(parts))


# -- figures -----------------------------------------------------------------------------------------------------------


@maker
def result(name: str) -> str:
    """Baseline and compact model of a run, as ``docs/figures.py`` kept them (in ``docs/figures``)."""
    found = _kept(name)
    old, new, speedup = found["models"]["baseline"], found["models"]["compact"], found["speedup"]
    metric = next(key for key in ("top1", "map50") if key in old)
    gained = f"{100 * (new[metric] - old[metric]):+.2f} pp"

    def line(title: str, key: str, show: Callable[[float], str]) -> list[str]:
        return [title, show(old[key]), show(new[key]), f"{100 * (new[key] / old[key] - 1):+.1f} %"]

    rows = [
        [f"{metric}, test split", f"{100 * old[metric]:.2f} %", f"{100 * new[metric]:.2f} %", gained],
        line("MACs", "macs", lambda v: f"{v / 1e6:.2f} M"),
        line("parameters", "params", lambda v: f"{v / 1e3:.1f} k"),
        line("file", "size_bytes", lambda v: f"{v / 1e3:.0f} kB"),
        line("p50 latency", "p50_ms", lambda v: f"{v:.3f} ms"),
        ["speed-up", "1", f"{speedup['value']:.2f}", f"95 % {speedup['low']:.2f} to {speedup['high']:.2f}"],
    ]
    made, busy = found["made"], ""
    if "contended" in made["flags"]:
        busy = "; other programs used the processor: the speed-up, of CPU time, holds, milliseconds are too long"
    told = f"(`{made['command']}` on {made['date']}, device `{found['device']}`: {made['processor']}{busy})"
    return f"{table(('', 'unpruned', 'compact', 'change'), rows)}\n\n{told}"


@maker
def benchmark(name: str) -> str:
    """The rows of a benchmark, as its ``--json`` wrote them into ``docs/figures``, and the command."""
    found = _kept(name)
    rows = [[_cell(value) for value in row.values()] for row in found["rows"]]
    return f"{table(found['rows'][0], rows)}\n\n(`{found['made']['command']}`, {_when(found['made'])})"


@maker
def bounds(name: str, beginning: str = "") -> str:
    """The figures of a benchmark whose names begin so, each with the bound that it keeps."""
    kept = [figure for figure in _kept(name)["figures"] if figure["name"].startswith(beginning)]
    return table(
        ("figure", "value", "bound"), ([f"`{f['name']}`", *map(_cell, (f["value"], f["bound"]))] for f in kept)
    )


@maker
def row(name: str, first: str, *columns: str) -> str:
    """Some cells of a benchmark's row, which its first cell names, in one line."""
    found = next(row for row in _kept(name)["rows"] if next(iter(row.values())) == first)
    return "; ".join(f"{column} {_cell(found[column])}" for column in columns)


@maker
def figures() -> str:
    """The runs and benchmarks whose figures stand in these pages."""
    rows = []
    for file in sorted(FIGURES.glob("*.json")):
        made = _kept(file.stem)["made"]
        rows.append([f"`{file.stem}`", f"`{made['command']}`", made["processor"], _when(made)])
    return table(("figures", "command", "processor", "date"), rows)


def _kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _when(made: dict[str, str]) -> str:
    return ", ".join(filter(None, (made["date"], made.get("copied") and f"copied {made['copied']}")))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@maker
def decisions() -> str:
    """The entries of DECISIONS.md, each with its status."""
    text = (ROOT / "DECISIONS.md").read_text(encoding="utf-8")
    rows, date = [], ""
    for level, title in re.findall(r"^(##|###) (.+)$", text, re.MULTILINE):
        if level == "##":
            date = title
            continue
        said = re.fullmatch(r'(.+?) \(superseded: "(.+)"\)', title)
        status = f"superseded by *{said[2]}*" if said else "stands"
        rows.append([f"[{said[1] if said else title}](#{anchor(title)})", status, date])
    return table(("decision", "status", "of"), rows)


def anchor(title: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main() -> int:
    """Write every page whose generated blocks are not what the code says; their names are printed."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (fresh := filled(text)) != text:
            page.write_text(fresh, encoding="utf-8")
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
