"""Guards against breakage outside this code: bounds in pyproject.toml that only these tests justify."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


def test_prefects_server_starts_under_the_locked_fastapi() -> None:
    """fastapi >= 0.155 makes this very import fail; the bound in pyproject.toml exists for it."""
    assert importlib.import_module("prefect.server.api.server")


def test_fastapi_takes_null_for_a_field_that_prefect_s_client_leaves_open() -> None:
    """fastapi >= 0.151 answers 422: `prefect deploy --all`, reading logs and more would fail."""
    from fastapi import Body, FastAPI
    from fastapi.testclient import TestClient
    from prefect.server.api.dependencies import LimitBody

    app = FastAPI()

    @app.post("/filter")
    def filter_(limit: int = LimitBody(), offset: int = Body(0)) -> int:
        return limit + offset

    assert TestClient(app).post("/filter", json={"limit": None}).status_code == 200


def test_sqlalchemy_is_one_prefects_scheduler_works_with() -> None:
    """Under sqlalchemy 2.1 Prefect's cron schedules never fire, without an error."""
    import sqlalchemy

    assert tuple(map(int, sqlalchemy.__version__.split(".")[:2])) < (2, 1)


@pytest.mark.parametrize(
    "module",
    [
        "secateur.pruning.plan",
        "secateur.pruning.search.protocol",
        "secateur.pruning.search.methods.ccep",
        "secateur.pruning.search.reward",
    ],
)
def test_algorithms_load_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["secateur.pipeline.cli.app", "secateur.device_profiles"])
def test_heavy_libraries_wait_until_they_are_needed(module: str) -> None:
    heavy = "{'torch', 'mlflow', 'prefect', 'torchvision'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_benchmarks_import_what_there_is() -> None:
    """They run for hours and on other days; a name that moved shows here."""
    for script in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secateur."):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    there = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert there, f"{script.name}: {node.module} has no {alias.name}"


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py"))
)
def test_a_benchmark_can_be_started(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else runs them for months, while what they import moves on."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"usage: {name}" in capsys.readouterr().out
