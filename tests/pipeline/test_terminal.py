"""Nothing of a user's is markup, moves a cursor or raises; every printed command can be pasted."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.device_profiles.wording import command, printable, printable_lines
from secateur.pipeline.progress import RichProgress
from secateur.pipeline.terminal import Terminal, table
from tests.pipeline.helpers import quick_device, write_tiny

ROOT = Path(__file__).parents[2]
NAMES = [
    "[bold]x",
    "[old] [/]",
    "[red",
    "a:smile:b",
    "it's [link=file:///x]y[/link]",
    "[@click=x]",
    '$(id) `id` "q"',
    "a\\b",
    "-x",
]
CONTROLS = [
    "\x1b[2J\x1b]0;mine\x07",
    "a\rb",
    "\x00",
    "\u202eabc",
    "\x9b2J",
    "\ud800",
    "\udcff",
    "a\u2028b",
    "\x7f",
    "tab\tx",
]


def printed(*objects: object, width: int = 80, encoding: str = "utf-8", tty: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    Terminal(file=file, width=width, force_terminal=tty, color_system=None).print(*objects)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", [*NAMES, "x" * 300, "日本語", "é"])
def test_a_text_is_printed_as_it_is(name: str) -> None:
    assert printed(f"Written: {name}") == f"Written: {name}\n"
    rows = table("name", name, title=name)
    rows.add_row(name, "1")
    assert printed(rows, width=2000).count(name) == 3


@pytest.mark.parametrize("text", CONTROLS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_what_no_terminal_shows_is_printed_as_an_escape(text: str, encoding: str) -> None:
    rows = table(text, title=text)
    rows.add_row(text)
    for found in (printed(text, encoding=encoding), printed(rows, encoding=encoding)):
        assert all(c.isprintable() or c == "\n" for c in found), ascii(found)
    if "\x1b" in text:
        assert "\\x1b[2J" in printed(text)


@given(st.text(max_size=40))
def test_any_text_can_be_printed_anywhere(text: str) -> None:
    rows = table("", text, title=text, right=[text])
    rows.add_row(text, text)
    for encoding in ("utf-8", "ascii"):
        for found in (printed(text, encoding=encoding), printed(rows, encoding=encoding)):
            assert all(c.isprintable() or c == "\n" for c in found)


def test_what_programs_are_told_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    Terminal(width=20).data({"a": [float("nan"), (float("inf"), 1.5)], "b": "\u00e9 [x]" * 20, "c": {"d": None}})
    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told == {"a": [None, [None, 1.5]], "b": "\u00e9 [x]" * 20, "c": {"d": None}}


def test_escapes_are_those_of_bytes_and_of_python() -> None:
    name = b"caf\xe9\n\x1b".decode("utf-8", "surrogateescape")
    assert printable(name) == "caf\\xe9\\n\\x1b"
    assert printable_lines("a\n\tb\r") == "a\n    b\\r"


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("text", [*NAMES, *CONTROLS])
def test_progress_shows_titles_notes_and_lines_as_they_are(text: str, tty: bool) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace")
    progress = RichProgress(Terminal(file=file, width=400, force_terminal=tty, color_system=None))
    progress.say(f"Note: {text}")
    with progress.stage(f"probe {text}") as report:
        report(1, 2, f"at {text}")
    file.flush()
    found = raw.getvalue().decode()
    assert all(f"{word} {printable(text)}".replace("tab\\tx", "tab") in found for word in ("probe", "at"))
    if text in CONTROLS:
        assert text not in found


# -- commands ----------------------------------------------------------------------------------------------------------

AWKWARD = [
    *NAMES,
    "/runs [old]/x y",
    "two\nlines",
    "\x1b[2J",
    "\udcff\udc80",
    "",
    "~",
    "*",
    "a;b",
    "a&b",
    "#x",
    "'",
    "é",
    "\\x41",
    "\tq",
]
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def pasted(text: str) -> list[bytes]:
    """The words that bash makes of a command."""
    script = "printf '%s\\0' " + text
    found = subprocess.run(["bash", "-c", script.encode("utf-8", "surrogateescape")], capture_output=True, check=True)
    return found.stdout.split(b"\0")[:-1]


def test_a_command_is_taken_by_a_shell_as_the_words_it_is_made_of() -> None:
    text = command("echo", *AWKWARD)
    assert text.isprintable() and printed(text) == f"{text}\n"
    assert pasted(text) == [word.encode("utf-8", "surrogateescape") for word in ("echo", *AWKWARD)]


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_any_words_can_be_pasted(words: list[str]) -> None:
    text = command("echo", *words)
    assert text.isprintable()
    assert pasted(text) == [word.encode() for word in ("echo", *words)]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is markup, and needs quotes."""
    folder = tmp_path / "runs [old] [bold]x 'y'"
    folder.mkdir()
    quick_device(folder)
    return folder


def call(folder: Path, *arguments: str | bytes, **env: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "SECATEUR_HOME": str(folder / "home"), **env}
    words = [sys.executable, "-m", "secateur", *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=surroundings, cwd=folder, errors="surrogateescape")


def test_paths_with_brackets_are_printed_as_they_are_and_commands_quote_them(odd: Path) -> None:
    (odd / "home" / "devices").mkdir(parents=True)
    added = call(odd, "devices", "add", "lab", "--from", "local", "--no-check")
    assert f"Written: {odd}/home/devices/lab.yaml" in added.stdout
    missing = call(odd, "run", f"{odd}/[none].yaml")
    assert missing.returncode == 2 and f"cannot read run file {odd}/[none].yaml" in missing.stderr
    refused = call(odd, "resume", str(odd))
    assert refused.returncode == 2 and f"{odd} is not a run directory" in refused.stderr
    for arguments in (("list", "[bold]"), ("[bold]x",)):
        refused = call(odd, *arguments)
        assert refused.returncode == 2 and arguments[-1] in refused.stderr.replace("│", "")


def test_a_printed_command_is_the_program_that_was_started(odd: Path) -> None:
    listed = call(odd, "devices", "list")
    words = listed.stdout.split("each needs a host:\n")[1].splitlines()[0]
    program = pasted(words)[: 3 if "-m" in words else 1]
    shown = subprocess.run(
        [*program, b"--help"], capture_output=True, text=True, cwd=odd, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert shown.returncode == 0 and "Prune a PyTorch vision model" in shown.stdout


@pytest.mark.parametrize(
    ("name", "encoding"), [(b"\xff\xfe.yaml", "utf-8"), (b"\x1b[2J.yaml", "ascii"), (b"two\nlines.yaml", "utf-8")]
)
def test_file_names_that_are_no_text_are_one_message(tmp_path: Path, name: bytes, encoding: str) -> None:
    for arguments in ((b"run", name), (b"devices", b"show", name), (name,)):
        found = call(tmp_path, *arguments, PYTHONIOENCODING=encoding, NO_COLOR="1")
        assert found.returncode == 2, found.stderr
        assert "Traceback" not in found.stderr and "\x1b" not in found.stderr


def test_a_file_whose_name_is_no_utf8_is_read_and_named(tmp_path: Path) -> None:
    file = write_tiny(tmp_path)
    odd = os.fsencode(tmp_path) + b"/caf\xe9.yaml"
    os.rename(file, odd)
    found = call(tmp_path, b"validate", odd)
    assert found.returncode == 0, found.stderr
    assert "caf\\xe9.yaml is valid" in found.stdout


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    words = f"{shlex.quote(sys.executable)} -m secateur explain ccep | head -c 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert found.returncode in (0, 141) and found.stderr == ""


def test_on_a_terminal_too_a_label_has_its_colour_and_a_text_has_none(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "SECATEUR_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "secateur", "list", "[red]x\x1b[2J"]
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, env=env, close_fds=True)
    process.wait()
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "\x1b[1;31mError:\x1b[0m" in shown and "[red]x\\x1b[2J" in shown and "\x1b[2J" not in shown


# -- contracts ---------------------------------------------------------------------------------------------------------

PRINTERS = {"pipeline/terminal.py", "pipeline/progress.py"}
ALONE = {"device_profiles/agent.py", "pipeline/tracking/loader.py", "pipeline/workloads/data/decode.py"}
"""Programs of their own, which run without the rest of Secateur; and the delivery speaks to its parent on stdout."""
TALKS = {"pipeline/tracking/delivery.py"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("pipeline", "pruning", "export", "device_profiles"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in PRINTERS | ALONE | TALKS:
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_no_other_module_makes_a_console_or_prints() -> None:
    faults = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich."):
                faults += [f"{name}: {a.name}" for a in node.names if a.name not in ("Padding", "Text")]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "typer.echo",
                "click.echo",
                "rich.print",
            ):
                faults.append(f"{name}:{node.lineno}: {ast.unparse(node.func)}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
                faults.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg in ("markup", "soft_wrap"):
                faults.append(f"{name}: {node.arg}=")
    assert not faults


def test_no_command_is_printed_without_quoting() -> None:
    """A value put into ``secateur ...``, ``prefect ...`` or ``mlflow ...`` by hand; ``command`` quotes it."""
    begun = re.compile(r"(?:^|[\n`(]|: )\s*(?:secateur|prefect|mlflow|pip|dask|ray) [^\n`]*$")
    faults = []
    for name, tree in modules():
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for before, after in itertools.pairwise(parts):
                text = str(before.value) if isinstance(before, ast.Constant) else ""
                if isinstance(after, ast.FormattedValue) and begun.search(text):
                    faults.append(f"{name}:{node.lineno}: {text}")
    assert not faults
