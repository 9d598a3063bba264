"""What every kind of target, runtime and format promises, ours and those of others."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from secateur.device_profiles.profile import RUNTIMES, TARGETS
from secateur.device_profiles.shelf import module_of
from secateur.device_profiles.target import TargetKind
from secateur.device_profiles.targets.local import LocalTarget
from secateur.device_profiles.testing import check_kind_of_target, check_runtime, check_target
from secateur.export.formats import FORMATS
from secateur.export.testing import check_format
from tests.device_profiles.tiny import quick_profile, skip_without, write_conv
from tests.seams.things import FORMAT, RUNTIME, TARGET

CONNECT: dict[str, dict[str, Any]] = {"local": {}, "ssh": {"host": "lab", "port": 22}}
"""Settings that would reach a device of each kind of target of ours."""


def of_others(folder: Path, text: str, name: str = "mine") -> ModuleType:
    """A module of somebody else's."""
    file = folder / f"{name}.py"
    file.write_text(text)
    return module_of(file)


@pytest.mark.parametrize("name", TARGETS.names())
def test_a_kind_of_target_says_what_it_must(name: str) -> None:
    check_kind_of_target(TARGETS.load(name), CONNECT[name])


def test_a_kind_of_target_from_elsewhere_is_checked_alike(tmp_path: Path) -> None:
    bench = of_others(tmp_path, TARGET)
    connect = {"serial": "A1"}
    check_kind_of_target(bench, connect)
    profile = quick_profile(connect=connect)
    check_target(bench.open_target(profile, TargetKind("bench", bench).settings(**connect)), write_conv(tmp_path / "m"))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ('extra="forbid"', 'extra="ignore"'),
        ('{"serial": text}', '{"serials": text}'),
        ("ADD_OPTIONS = (", "ADD_OPTIONS = () and ("),
        ('"board " + str', '"board\\n" + str'),
    ],
)
def test_a_kind_of_target_that_breaks_a_promise_is_told(good: str, bad: str, tmp_path: Path) -> None:
    assert good in TARGET
    with pytest.raises(AssertionError):
        check_kind_of_target(of_others(tmp_path, TARGET.replace(good, bad)), {"serial": "A1"})


class Careless(LocalTarget):
    """A target that raises what comes, and brings a file to another place each time."""

    def fetch(self, path: str, to: Path) -> None:
        to.write_bytes(Path(path).read_bytes())


class Restless(LocalTarget):
    brought = 0

    def put(self, path: Path) -> str:
        self.brought += 1
        return f"{super().put(path)}-{self.brought}"


@pytest.mark.parametrize(("kind", "told"), [(Careless, "raises FileNotFoundError"), (Restless, "brought again")])
def test_a_target_that_breaks_a_promise_is_told(kind: type[LocalTarget], told: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=told):
        check_target(kind(), write_conv(tmp_path / "m"))


@pytest.mark.parametrize("name", RUNTIMES.names())
def test_a_runtime_gives_what_the_agent_needs(name: str, tmp_path: Path) -> None:
    skip_without(name)
    module = RUNTIMES.load(name)
    file = tmp_path / "m"
    FORMATS.load(module.FORMAT).write(write_conv(tmp_path / "m.onnx"), file)
    check_runtime(module, file)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("", ""),
        ('"version": "1.0"', '"version": 1'),
        ('"float32")', '"tensor(float)")'),
        ("return session.run(None, feeds)", "return session.run(None, feeds) * 2"),
        ("import gzip\n", "import gzip\nfrom secateur import pruning\n"),
        ("import gzip\n", "import gzip\nfirst = gzip if (second := gzip) else None\nmatch second:\n    case _: pass\n"),
    ],
)
def test_a_runtime_from_elsewhere_is_checked_alike(good: str, bad: str, tmp_path: Path) -> None:
    packed = of_others(tmp_path, FORMAT, "packed")
    packed.write(write_conv(tmp_path / "m.onnx"), tmp_path / "m.gz")
    text = RUNTIME.format(format="packed")
    assert good in text
    runtime = of_others(tmp_path, text.replace(good, bad) if good else text)
    if not good:
        check_runtime(runtime, tmp_path / "m.gz")
        return
    with pytest.raises(AssertionError):
        check_runtime(runtime, tmp_path / "m.gz")


@pytest.mark.parametrize("name", FORMATS.names())
def test_a_format_is_written_alike_each_time(name: str, tmp_path: Path) -> None:
    skip_without(name)
    (tmp_path / "out").mkdir()
    check_format(FORMATS.load(name), write_conv(tmp_path / "m.onnx"), tmp_path / "out")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("", ""),
        ('SUFFIX = ".gz"', 'SUFFIX = "gz"'),
        ("mtime=0", "mtime=id(object()) % 1000 + len(str(to))"),
        ("def write(source, to):", "def verify(file): ...\n\n\ndef write(source, to):"),
        ("def write(source, to):", "def write(source, to):\n    to.with_name('left').touch()"),
    ],
)
def test_a_format_from_elsewhere_is_checked_alike(good: str, bad: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = write_conv(tmp_path / "m.onnx")
    assert good in FORMAT
    module = of_others(tmp_path, FORMAT.replace(good, bad) if good else FORMAT)
    if not good:
        check_format(module, model, tmp_path / "out")
        return
    with pytest.raises(AssertionError):
        check_format(module, model, tmp_path / "out")
