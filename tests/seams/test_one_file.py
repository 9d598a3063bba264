"""What is promised to be one file is one file: each is added in a temporary folder, in each of three ways, and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.helpers import QUICK_DEVICE, TINY, merged
from tests.seams.things import FORMAT, METHOD, RUNTIME, TARGET

ROOT = Path(__file__).parents[2]
PACKAGES = ("secateur", "device_profiles", "export", "pruning", "pipeline")
GROUPS = {"methods": "mine", "targets": "bench", "runtimes": "zipped", "formats": "packed"}


@dataclass
class Place:
    """A folder of a user's, and how the four things are named there."""

    folder: Path
    tree: Path
    extra: tuple[Path, ...] = ()
    method: str = "mine"
    target: str = "bench"
    runtime: str = "zipped"

    def write(self) -> None:
        """A run file and the profile of its device."""
        profile = merged(QUICK_DEVICE, {"target": self.target, "runtime": self.runtime, "connect": {"serial": "A1"}})
        (self.folder / "board.yaml").write_text(yaml.safe_dump(profile))
        search = {"method": self.method, "images": 32, "options": {"shares": [0.75, 0.5]}}
        changes: dict[str, Any] = {
            "search": {**search, "target": {"macs_ratio": 0.9}},
            "device": {"profile": str(self.folder / "board.yaml"), "probe": False},
            "workers": {"engine": "processes", "count": 1},
            "baseline": {"epochs": 1, "autocast": "fp32"},
        }
        tiny = merged(TINY, {"search": None})
        (self.folder / "run.yaml").write_text(yaml.safe_dump({**merged(tiny, changes), "search": changes["search"]}))

    def secateur(self, *words: object, code: int = 0) -> str:
        """What ``secateur WORDS`` says, in a process of its own that sees this tree."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (self.tree, *self.extra)))}
        command = [sys.executable, "-m", "secateur", *map(str, words)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        return said

    def run_directory(self) -> Path:
        (found,) = Path(os.environ["SECATEUR_HOME"], "runs").iterdir()
        return found


def in_the_tree(folder: Path) -> Place:
    """A copy of the tree with four files more, and nothing edited."""
    tree = folder / "tree"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "pruning/search/methods/mine.py").write_text(METHOD)
    (tree / "device_profiles/targets/bench.py").write_text(TARGET)
    (tree / "device_profiles/runtimes/zipped.py").write_text(RUNTIME.format(format="packed"))
    (tree / "export/formats/packed.py").write_text(FORMAT)
    return Place(folder, tree)


def by_entry_points(folder: Path) -> Place:
    """An installed package that has them."""
    texts = {"methods": METHOD, "targets": TARGET, "runtimes": RUNTIME.format(format="packed"), "formats": FORMAT}
    site = folder / "site"
    install(site, "theirs", {group: {name: texts[group]} for group, name in GROUPS.items()})
    return Place(folder, ROOT, (site,))


def install(site: Path, package: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """A package in a folder of packages: group of entry points -> name -> text of its module."""
    info, modules = site / f"{package}-1.0.dist-info", site / package
    for made in (info, modules):
        made.mkdir(parents=True)
    lines = []
    for group, texts in groups.items():
        lines.append(f"[secateur.{group}]")
        for name, text in texts.items():
            (modules / f"{name}.py").write_text(text)
            lines.append(f"{name} = {package}.{name}")
    (modules / "__init__.py").touch()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def as_files(folder: Path) -> Place:
    """Files beside the run file."""
    (folder / "mine.py").write_text(METHOD)
    (folder / "bench.py").write_text(TARGET)
    (folder / "zipped.py").write_text(RUNTIME.format(format="packed.py:packed"))
    (folder / "packed.py").write_text(FORMAT)
    return Place(folder, ROOT, (), "mine.py:mine", "bench.py:bench", "zipped.py:zipped")


WAYS = {"a file of the tree": in_the_tree, "an entry point": by_entry_points, "a file beside the run file": as_files}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_target_runtime_and_format_are_one_file_each(way: str, tmp_path: Path) -> None:
    from tests.device_profiles.tiny import write_conv

    place = WAYS[way](tmp_path)
    place.write()
    trusted = ("--trust",) if place.method.endswith(":mine") else ()
    model = write_conv(tmp_path / "m.onnx")
    out = tmp_path / "times.json"
    board = tmp_path / "board.yaml"
    place.secateur("benchmark", model, "--device", board, "--tier", "search", "--json", out, *trusted)
    (process,) = json.loads(out.read_text())["processes"]
    assert process["environment"]["zipped"] == "1.0" and "onnxruntime" not in process["environment"]
    said = place.secateur("validate", tmp_path / "run.yaml", *trusted)
    assert "is valid" in said
    if trusted:
        return
    assert "every group keeps the same share" in place.secateur("list", "methods")
    (tmp_path / "template.yaml").write_text("extends: local\ntarget: bench\n")
    assert "--serial" in place.secateur("devices", "add", "--help")
    devices = Path(os.environ["SECATEUR_HOME"], "devices")
    devices.mkdir(parents=True)
    shutil.move(tmp_path / "template.yaml", devices / "benches.yaml")
    place.secateur("devices", "add", "mine", "--from", "benches", "--serial", "B2", "--no-check")
    assert yaml.safe_load((devices / "mine.yaml").read_text())["connect"] == {"serial": "B2"}
    assert "board B2" in place.secateur("devices", "list")


BROKEN = {"methods": {"crash": METHOD + "1 / 0\n", "less": '"""Less than a method."""\n'}}
"""Modules that cannot be used."""


@pytest.mark.long
@pytest.mark.parametrize("way", [by_entry_points, as_files])
def test_a_whole_run(way: Callable[[Path], Place], tmp_path: Path) -> None:
    """Search with a worker process, gate, report, resume and rescore; broken packages beside it are in nobody's way."""
    place = way(tmp_path)
    place.write()
    install(tmp_path / "broken", "broken", BROKEN)
    place.extra += (tmp_path / "broken",)
    trusted = ("--trust",) if way is as_files else ()
    if trusted:
        refused = place.secateur("run", "run.yaml", code=2)
        for name in ("search.method: mine.py:mine", "bench.py:bench", "zipped.py:zipped", "secateur trust"):
            assert name in refused
    assert "Gate: passed" in place.secateur("run", "run.yaml", *trusted)
    directory = place.run_directory()
    assert yaml.safe_load((directory / "run.yaml").read_text())["search"]["method"] == place.method
    assert place.method in (directory / "report.html").read_text()
    before = (directory / "journal.jsonl").read_bytes()
    shutil.rmtree(directory / "stages")
    place.secateur("resume", directory)
    assert (directory / "journal.jsonl").read_bytes() == before, "replayed, and nothing evaluated anew"
    assert "mine" in place.secateur("rescore", directory, "--reward", "mnasnet", "--set", "target_ratio=0.5")


@pytest.mark.slow
def test_a_package_that_cannot_be_used_is_one_message(tmp_path: Path) -> None:
    place = by_entry_points(tmp_path)
    place.write()
    install(tmp_path / "broken", "broken", BROKEN)
    install(tmp_path / "twin", "twin", {"methods": {"mine": METHOD}})
    place.extra += (tmp_path / "broken",)
    for name, fault in (("crash", "ZeroDivisionError: division by zero"), ("less", "has no Options, search")):
        said = place.secateur("validate", "run.yaml", "--set", f"search.method={name}", code=2)
        assert "has 1 fault" in said and said.count(fault) == 1 and "Traceback" not in said
    listed = " ".join(place.secateur("list", "methods").split())
    assert "less unusable: broken.less" in listed and "mine Mine: every group keeps" in listed and "acp ACP:" in listed
    place.extra += (tmp_path / "twin",)
    said = place.secateur("validate", "run.yaml", code=2)
    assert "method mine is there 2 times" in said and "theirs.mine" in said and "twin.mine" in said
