"""One name on a user's machine: what a wheel installs is called secateur, once, and the library needs few packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from itertools import chain
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from secateur.pipeline.errors import EXIT_USER
from secateur.pipeline.parts import PARTS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("device_profiles", "export", "pipeline", "pruning")
CORE = ("torch", "numpy", "safetensors", "pydantic", "pyyaml")
"""All that ``secateur.pruning`` needs."""


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_every_package_is_installed() -> None:
    """One that pyproject.toml does not name is missing from the wheel and the image, and from no checkout."""
    table = PROJECT["tool"]["setuptools"]
    found = {
        ".".join(("secateur", *file.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if "templates" not in file.parts
    }
    assert set(table["packages"]) == found | {"secateur"}
    assert table["package-dir"] == {f"secateur.{folder}": folder for folder in FOLDERS}
    assert {name: os.readlink(ROOT / "secateur" / name) for name in FOLDERS} == {name: f"../{name}" for name in FOLDERS}


@pytest.mark.parametrize("links", [True, False], ids=["with links", "links checked out as files"])
def test_a_wheel_installs_one_name_and_every_file_once(links: bool, tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("secateur", *FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if not links:  # as git does where a file system has none
        for folder in FOLDERS:
            (source / "secateur" / folder).unlink()
            (source / "secateur" / folder).write_text(f"../{folder}")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
        inside = [name for name in wheel.namelist() if ".dist-info/" not in name]
    shipped = [
        p.relative_to(ROOT)
        for f in FOLDERS
        for p in (ROOT / f).rglob("*.*")
        if p.suffix in (".py", ".yaml", ".j2", ".json", ".js", ".LICENSE")
    ]
    named = ("__init__.py", "__main__.py", "py.typed", *(path.as_posix() for path in shipped))
    assert sorted(inside) == sorted(f"secateur/{name}" for name in named)
    code = (
        "import secateur.pruning, secateur.pipeline.report\n"
        "from importlib.util import find_spec\n"
        f"assert not any(map(find_spec, {FOLDERS}))\n"
        "print(secateur.pruning.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(site / "secateur" / "pruning" / "__init__.py"), done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_no_second_copy_of_its_package(folder: str) -> None:
    """In a checkout every folder is on the path; under its own name it would bring another of every class."""
    code = f"import secateur.{folder}, {folder}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"ImportError: {folder} is imported as secateur.{folder}" in done.stderr
    assert folder not in sys.modules


def test_a_deployment_of_an_earlier_secateur_says_how_it_is_made_anew() -> None:
    code = "import importlib; importlib.import_module('pipeline.flow.deployed')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "make it anew with `secateur deploy RUN_FILE`" in done.stderr


@pytest.mark.parametrize("module", ["secateur", "secateur.pipeline.cli.program"])
def test_python_m_is_the_program(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "list", "devices"], capture_output=True, text=True)
    assert done.returncode == 0 and "local" in done.stdout


# -- parts -------------------------------------------------------------------------------------------------------------

ONLY = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {allowed!r} and top not in sys.stdlib_module_names and top[:5] != "_sysc":
            raise ModuleNotFoundError(f"No module named {{top!r}}", name=top)
sys.meta_path.insert(0, Only())
"""
"""Refuses what is not named, as if it were not installed."""
LIBRARY = """
import torch
from torch import nn
from secateur.pruning import PruningPlan, certify, cost, load_pruned, prune, save_pruned, trace, uniform_plan
from secateur.pruning.search import METHODS

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))

model, example = tiny().eval(), torch.randn(1, 3, 5, 5)
graph = trace(model, example)
plan = uniform_plan(graph, 0.5, model=model)
assert cost(graph, plan).macs < cost(graph, PruningPlan.full(graph.groups)).macs
small = prune(model, graph, plan)
assert certify(model, small, graph, plan, example).ok
save_pruned("half", small, plan)
again, _ = load_pruned("half", tiny(), graph)
assert torch.equal(again.eval()(example), small.eval()(example))
METHODS.load("uniform")
"""


def closure(requirements: list[str]) -> set[str]:
    """What is installed with some packages, as it is imported."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    todo, found = list(names(requirements)), set[str]()
    while todo:
        if (name := todo.pop()) in found or name not in installed:
            continue
        found.add(name)
        needs = map(Requirement, installed[name].requires or ())
        todo += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    modules = packages_distributions()
    return {module for module, owners in modules.items() if found & set(map(canonicalize_name, owners))}


def only(requirements: list[str]) -> str:
    return ONLY.format(allowed=sorted(closure(requirements) | {"secateur", "_distutils_hack"}))


def test_the_library_needs_few_packages(tmp_path: Path) -> None:
    assert names(PROJECT["project"]["dependencies"]) == set(CORE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", only(PROJECT["project"]["dependencies"]) + LIBRARY]
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_of_a_part_is_known() -> None:
    """Else a command would call its absence a bug."""
    extras = PROJECT["project"]["optional-dependencies"]
    modules = packages_distributions()
    for extra, packages in PARTS.items():
        brought = {canonicalize_name(owner) for package in packages for owner in modules[package]}
        assert names(extras[extra]) - {"secateur"} <= brought, extra
    assert Requirement(extras["all"][0]).extras == set(extras) - {"all", "dev"} == {*PARTS, "server"}


@pytest.mark.parametrize(
    ("words", "parts", "missing"),
    [
        (["list", "methods"], (), "pipeline"),
        (["run", "tiny.yaml"], ("pipeline", "-mlflow"), "pipeline"),
        (["run", "tiny.yaml"], ("pipeline", "-onnx"), "export"),
    ],
)
def test_a_command_names_the_part_it_misses(
    words: list[str], parts: tuple[str, ...], missing: str, tmp_path: Path
) -> None:
    from tests.pipeline.helpers import write_tiny

    write_tiny(tmp_path)
    extras = PROJECT["project"]["optional-dependencies"]
    without = {part[1:] for part in parts if part[0] == "-"}
    lines = [*PROJECT["project"]["dependencies"], *(line for part in parts for line in extras.get(part, ()))]
    lines += extras["export"] if parts else []
    allowed = [line for line in lines if Requirement(line).name != "secateur"]
    allow = sorted((closure(allowed) | {"secateur", "_distutils_hack"}) - without)
    code = ONLY.format(allowed=allow) + "\nfrom secateur.pipeline.cli.program import run_program; run_program()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == EXIT_USER, done.stderr
    assert f" install 'secateur[{missing}]'" in done.stderr


# -- what is given away ------------------------------------------------------------------------------------------------


def test_every_dependency_has_a_row_in_the_decisions() -> None:
    text = (ROOT / "DECISIONS.md").read_text(encoding="utf-8")
    rows = text.partition("Dependencies\n\n")[2].partition("\n## ")[0]
    lines = [*PROJECT["project"]["dependencies"], *chain(*PROJECT["project"]["optional-dependencies"].values())]
    without = names(lines) - {"secateur", "setuptools"}
    assert {name for name in without if not re.search(rf"(?i)\b{name.replace('-', '[-_]')}\b", rows)} == set()


def test_the_bill_of_a_wheel_has_what_users_need_and_its_record_is_whole(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "docker"))
    from dist import BILL, asked, put_into

    found = {canonicalize_name(each.metadata["Name"]) for each in asked(ROOT / "pyproject.toml", distributions())}
    assert {"torch", "mlflow", "flask-wtf", "onnxruntime", "setuptools"} <= found  # flask-wtf: of mlflow[auth]
    assert not {"pytest", "sphinx", "mypy", "torch-pruning"} & found
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with ZipFile(wheel, "w") as file:
        file.writestr("a.py", "")
        file.writestr("a-1.dist-info/RECORD", "a.py,,\na-1.dist-info/RECORD,,\n")
    put_into(wheel, BILL, b"{}")
    with ZipFile(wheel) as file:
        record = file.read("a-1.dist-info/RECORD").decode().splitlines()
        assert file.namelist()[-1] == "a-1.dist-info/RECORD" and file.read(f"a-1.dist-info/{BILL}") == b"{}"
    digest = "RBNvo1WzZ4oRRq0W9-hknpT7T8If536DEMBg9hyq_4o"
    assert record[-2:] == [f"a-1.dist-info/{BILL},sha256={digest},2", "a-1.dist-info/RECORD,,"]
