from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from secateur.device_profiles import DeviceError, Multiples
from secateur.device_profiles.calibration import load, path_of, save
from secateur.device_profiles.staircase import Staircase
from tests.device_profiles.tiny import quick_profile

FOUND = Staircase("test", "aa", Multiples(conv=16), {"conv": {1: 1.5, 2: 1.25}}, {"conv": {1: 0.0}}, 0.01, {}, 1.0)


def test_a_probe_is_kept_for_its_profile_and_its_device(tmp_path: Path):
    profile, folder = quick_profile(), tmp_path / "made" / "devices"
    assert load(folder, profile) is None
    path = save(folder, profile, FOUND)
    assert path == path_of(folder, profile) == folder / "test.probe.json"
    assert load(folder, profile) == load(folder, profile, "aa") == FOUND
    assert load(folder, profile, "bb") is None
    assert load(folder, quick_profile(name="other")) is None


def test_a_newer_probe_replaces_the_older_one_and_leaves_nothing_behind(tmp_path: Path):
    newer = replace(FOUND, fingerprint="bb")
    for staircase in (FOUND, newer):
        save(tmp_path, quick_profile(), staircase)
    assert load(tmp_path, quick_profile()) == newer
    assert [path.name for path in tmp_path.iterdir()] == ["test.probe.json"]


def test_a_probe_that_cannot_be_written_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, quick_profile(), FOUND)

    def full_disk(self: Path, *args: object, **options: object) -> int:
        with self.open("w") as file:
            file.write("{")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, quick_profile(), replace(FOUND, fingerprint="bb"))
    assert load(tmp_path, quick_profile()) == FOUND


@pytest.mark.parametrize("text", ["", "{}", "null", '{"format": 1}'])
def test_a_damaged_probe_is_an_error_not_a_missing_one(tmp_path: Path, text: str):
    save(tmp_path, quick_profile(), FOUND).write_text(text)
    with pytest.raises(DeviceError, match=r"Staircase\.to_json"):
        load(tmp_path, quick_profile(), "aa")
