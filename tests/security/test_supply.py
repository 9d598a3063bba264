"""What we stand on: the lock is exact, what is installed is the lock, and nothing else was let in."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.tools import audit

LOCK = Path(__file__).parents[2] / "requirements.lock"


@pytest.mark.slow
def test_this_environment_is_the_lock() -> None:
    assert audit.offline(LOCK, distributions()) == []


@pytest.mark.parametrize(
    "line",
    [
        *("numpy", "numpy>=2", "numpy==2.*", "numpy @ file:///tmp/numpy.whl", "-e .", "git+ssh://host/numpy"),
        *("./numpy.whl", "--index-url https://elsewhere.example", "--extra-index-url x", "numpy==2.4.6 --pre"),
    ],
)
def test_a_line_that_is_no_exact_version_is_a_fault(line: str) -> None:
    assert len(audit.lock_faults([line])) == 1


def test_a_lock_may_differ_by_platform_but_not_repeat_itself() -> None:
    by_platform = ["a==1 ; sys_platform == 'linux'", "a==2 ; sys_platform != 'linux'", "# text", ""]
    assert audit.lock_faults(by_platform) == []
    assert audit.pins(by_platform) == {"a": {"1", "2"}}
    assert audit.lock_faults(["a==1", "A==2"]) == ["line 2: A is there twice (first on line 1)"]


def test_what_is_not_of_the_lock_is_a_fault() -> None:
    faults = audit.environment_faults(
        {"a": "1", "b": "2", "c": "3+cpu", "pip": "9"}, {"a": {"1"}, "b": {"1"}, "c": {"3"}}
    )
    assert faults == ["b 2 is installed, the lock says 1"]
    assert audit.environment_faults({"d": "1"}, {}) == ["d 1 is installed and not in the lock"]


def test_what_builds_the_project_is_of_the_lock() -> None:
    assert audit.build_faults(["setuptools>=77"], {"setuptools": {"84.2.1"}}) == []
    assert audit.build_faults(["setuptools>=99"], {"setuptools": {"84.2.1"}}) == [
        "the build asks for setuptools>=99, the lock says 84.2.1"
    ]
    assert audit.build_faults(["hatchling"], {}) == ["the build asks for hatchling, the lock says nothing"]


@pytest.mark.parametrize("name", ["Dockerfile", "Makefile"])
def test_nothing_is_built_by_what_is_not_of_the_lock(name: str) -> None:
    installs = re.findall(r"pip install [^\n]*", (LOCK.parent / name).read_text())
    projects = [line for line in installs if re.search(r" (-e )?\.( |$)", line)]
    assert projects and all("--no-deps --no-build-isolation" in line for line in projects)
    files = [line for line in installs if " -r " in line]
    assert files and all("--only-binary :all:" in line for line in files)


@pytest.mark.parametrize(
    ("words", "fine"),
    [
        (["MIT"], True),
        (["Apache Software License"], True),
        (["MPL-2.0"], True),
        (["EPL-2.0 OR GPL-2.0-or-later"], True),
        (["GPL-3.0"], False),
        (["Other/Proprietary License"], False),
        ([], False),
    ],
)
def test_licences_are_known_or_looked_at(words: list[str], fine: bool) -> None:
    assert (audit.licence_faults("package", words) == []) is fine
