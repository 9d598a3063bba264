"""Shelves: what stands in the folder, what packages add, and what a file brings; a broken one hides no other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from secateur.device_profiles import DeviceError, load_profile, shelf
from secateur.device_profiles.shelf import NotAdmittedError, PluginError, Shelf
from secateur.device_profiles.target import is_template, open_target

GOOD = '"""A good one."""\n\nclass Settings: ...\n\ndef open_target(profile, settings): ...\n'
TARGETS = Shelf("secateur.device_profiles.targets", "target", ("Settings", "open_target"), "secateur.targets")


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_admitted", {})


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str = "theirs", **modules: str) -> None:
    """A package with an entry point for each of these modules."""
    for name, text in modules.items():
        (folder / f"{package}_{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{package}_{name}", raising=False)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    points = "".join(f"{name} = {package}_{name}\n" for name in modules)
    (info / "entry_points.txt").write_text(f"[secateur.targets]\n{points}")
    if str(folder) not in shelf.PATH:
        monkeypatch.setattr(shelf, "PATH", (*shelf.PATH, str(folder)))
        monkeypatch.syspath_prepend(str(folder))
    shelf._all_points.cache_clear()


def test_broken_packages_are_one_message_each_and_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    installed(
        tmp_path,
        monkeypatch,
        good=GOOD,
        crash=GOOD + "1 / 0\n",
        less='"""Less."""\n\nclass Settings: ...\n',
        mute=GOOD.partition("\n")[2],
    )
    told = TARGETS.descriptions()
    assert told["good"] == "A good one." and told["local"].startswith("The local machine")
    assert "unusable" in told["less"] and "has no open_target" in told["less"]
    assert "unusable" in told["mute"] and "no docstring" in told["mute"]
    assert {"good", "crash", "less", "mute", "local", "ssh"} <= set(TARGETS.names())
    for name, said in (("crash", "ZeroDivisionError"), ("less", "no open_target"), ("mute", "no docstring")):
        with pytest.raises(PluginError, match=said) as caught:
            TARGETS.load(name)
        assert f"entry point {name} of package theirs" in str(caught.value) and "\n" not in str(caught.value)
    assert {"good", "local", "ssh"} == set(TARGETS.loaded())


def test_two_of_one_name_are_refused_with_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    installed(tmp_path, monkeypatch, local=GOOD, good=GOOD)
    installed(tmp_path, monkeypatch, "others", good=GOOD)
    with pytest.raises(PluginError, match=r"targets/local\.py and theirs_local") as caught:
        TARGETS.load("local")
    assert "2 times" in str(caught.value)
    with pytest.raises(PluginError, match=r"theirs_good \(.*\) and others_good|others_good \(.*\) and theirs_good"):
        TARGETS.load("good")
    assert TARGETS.load("ssh").__name__ == "secateur.device_profiles.targets.ssh"


def test_a_broken_package_is_a_fault_of_the_profile_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    installed(tmp_path, monkeypatch, crash=GOOD + "1 / 0\n")
    (tmp_path / "mine.yaml").write_text("target: crash\nthreads: 0\n")
    with pytest.raises(DeviceError, match=r"line 1: target: .*ZeroDivisionError") as caught:
        load_profile(tmp_path / "mine.yaml")
    assert "line 2: threads" in str(caught.value)
    installed(tmp_path, monkeypatch, "bare", bare=GOOD)
    (tmp_path / "mine.yaml").write_text("target: bare\nconnect: {serial: A1}\n")
    with pytest.raises(DeviceError, match="line 1: target: the Settings of target bare are no pydantic model"):
        load_profile(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (GOOD, "mine.py:mine", ""),
        ('"""A file."""\n\nclass Board:\n    """A board."""\n    Settings = open_target = 1\n', "mine.py:Board", ""),
        (GOOD, "mine.py:other", "after the colon comes mine, for the whole file, or a class in it"),
        ("1 / 0", "mine.py:mine", "cannot be imported: ZeroDivisionError"),
        ("def (", "mine.py:mine", "SyntaxError"),
        ('"""Less."""', "mine.py:mine", "has no Settings, open_target"),
        (GOOD.partition("\n")[2], "mine.py:mine", "no docstring"),
    ],
)
def test_a_file_is_loaded_once_it_is_admitted(tmp_path: Path, text: str, name: str, said: str):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert not TARGETS.has(name)
    with pytest.raises(NotAdmittedError, match="nobody has consented"):
        TARGETS.load(name)
    TARGETS.admit(name, file)
    assert TARGETS.has(name)
    if said:
        with pytest.raises(PluginError, match=said):
            TARGETS.load(name)
        assert set(TARGETS.loaded()) == {"local", "ssh"}
    else:
        assert TARGETS.load(name) is TARGETS.load(name)


def test_a_profile_s_file_lies_beside_it_and_is_not_opened_unasked(tmp_path: Path):
    mark = tmp_path / "executed"
    (tmp_path / "mine.py").write_text(GOOD + f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "base.yaml").write_text("target: mine.py:mine\nconnect: {serial: A1}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "heir.yaml").write_text("extends: base\nthreads: 2\n")
    heir = load_profile(tmp_path / "sub" / "heir.yaml", [tmp_path])
    assert heir.target == f"{tmp_path}/mine.py:mine" and not is_template(heir)
    with pytest.raises(DeviceError, match="nobody has consented"):
        open_target(heir)
    assert not mark.exists()
