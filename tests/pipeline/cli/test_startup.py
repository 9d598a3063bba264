"""What the quick commands do not import, which is what makes them quick; and that help stays what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import typer.main

from secateur.pipeline.cli.app import app
from secateur.pipeline.cli.help import narrowed

ALWAYS_LATE = {
    *("torch", "torchvision", "mlflow", "prefect", "onnx", "onnxruntime", "onnxscript", "optuna", "pymoo", "sklearn"),
    *("scipy", "numpy", "pandas", "pyarrow", "PIL", "psutil", "jinja2", "sqlalchemy", "secateur.export"),
}
LATE_IN = {
    "--help": {
        "pydantic",
        "yaml",
        "asyncssh",
        "socket",
        "ssl",
        "rich.markdown",
        "rich.traceback",
        "secateur.device_profiles.profile",
    },
    "list methods": {
        "yaml",
        "asyncssh",
        "secateur.pipeline.config.schema",
        "secateur.pruning.search.methods",
        "secateur.device_profiles.profile",
    },
    "list workloads": {"asyncssh", "secateur.pipeline.workloads", "secateur.pruning.search.methods"},
    "list devices": {"asyncssh", "asyncio", "secateur.pipeline.workloads", "secateur.pruning.search.methods"},
    "explain max_error": {"asyncssh", "secateur.pipeline.workloads", "secateur.pruning.search.methods"},
    "devices --help": {"asyncssh", "asyncio", "yaml", "secateur.device_profiles.profile"},
    "devices list": {"asyncssh", "asyncio", "secateur.pipeline.workloads", "secateur.pruning.search.methods"},
}
"""Command -> what it does not import; parsing any command's options imports pydantic (typer does)."""
PERFORM = """
import json, sys
from secateur.pipeline.cli import app
try:
    app.main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(sorted(sys.modules)))
"""
HELP = """
import sys
from secateur.pipeline.cli import app
if sys.argv.pop(1) == "whole":
    import rich.markdown, rich.traceback
app.main()
"""


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


@pytest.mark.parametrize("command", LATE_IN)
def test_quick_commands_import_nothing_heavy(command: str) -> None:
    imported = set(json.loads(python(PERFORM, *command.split()).splitlines()[-1]))
    assert imported & (ALWAYS_LATE | LATE_IN[command]) == set()


@pytest.mark.parametrize("command", ["", "run", "devices add"])
def test_help_is_the_same_without_what_it_leaves_out(command: str) -> None:
    arguments = [*command.split(), "--help"]
    assert "Usage" in python(HELP, "light", *arguments)
    assert python(HELP, "light", *arguments) == python(HELP, "whole", *arguments)


def test_a_command_has_its_options_and_only_the_others_go_without() -> None:
    """Typer reads the options of every command; here, of those that the command line names."""
    narrow = typer.main.get_command(narrowed(app, ["devices", "add", "kitchen"]))
    whole = typer.main.get_command(app)
    assert parameters(narrow, "devices", "add") == parameters(whole, "devices", "add") != []
    assert parameters(narrow, "validate") == []
    assert [c.name for c in narrow.commands.values()] == [c.name for c in whole.commands.values()]
    assert typer.main.get_command(app).commands["validate"].params


def parameters(command: Any, *names: str) -> list[str]:
    for name in names:
        command = command.commands[name]
    return [parameter.name for parameter in command.params]


def test_what_help_leaves_out_is_there_for_others() -> None:
    code = (
        "from secateur.pipeline.cli.help import import_formatter; import_formatter();"
        "from rich.markdown import Markdown; from rich.traceback import Traceback;"
        "print(Markdown.__module__, Traceback.__module__)"
    )
    assert python(code).split() == ["rich.markdown", "rich.traceback"]
