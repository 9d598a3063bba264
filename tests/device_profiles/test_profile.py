from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from device_profiles import DeviceError, known_profiles, load_profile


def test_every_shipped_profile_loads():
    profiles = known_profiles()
    assert "local" in profiles
    for name in profiles:
        assert load_profile(name).name == name


def test_local_profile_follows_the_noise_protocol():
    profile = load_profile("local")
    assert (profile.threads, profile.provider, profile.channel_multiple) == (1, "CPUExecutionProvider", 8)
    assert (profile.search.processes, profile.search.min_repeats, profile.search.min_seconds) == (1, 20, 0.4)
    assert (profile.final.processes, profile.final.min_repeats, profile.final.min_seconds) == (7, 50, 0.5)
    assert profile.tier("search") == profile.search
    assert profile.tier("final") == profile.final


def test_profiles_are_frozen():
    with pytest.raises(ValidationError):
        load_profile("local").threads = 2


def test_unknown_name_suggests_a_close_one_and_lists_the_known(tmp_path: Path):
    with pytest.raises(DeviceError, match=r"'lokal'.*Did you mean 'local'\?.*Known: local") as caught:
        load_profile("lokal")
    assert caught.value.code == "profile"
    with pytest.raises(DeviceError, match="Known: local"):
        load_profile("raspberry", [tmp_path])


def test_extra_folder_and_path(tmp_path: Path):
    file = tmp_path / "board.yaml"
    file.write_text("threads: 2\nbudgets:\n  p95_ms: 12.5\n  size_bytes: 1000\n")
    assert load_profile("board", [tmp_path]).budgets.p95_ms == 12.5
    assert load_profile(file) == load_profile("board", [tmp_path])
    assert known_profiles([tmp_path])["board"] == file
    with pytest.raises(DeviceError, match=r"cannot read.*none\.yaml"):
        load_profile(tmp_path / "none.yaml")


def test_all_faults_are_reported_together_with_their_lines(tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "thread: 2\nbatch: none\nsearch:\n  processes: 1\n  warmup: -1\n  min_repeats: 20\n"
        "budgets:\n  p95: 3\nbatch: 2\nname: other\n"
    )
    with pytest.raises(DeviceError) as caught:
        load_profile(file)
    message = str(caught.value)
    assert str(file) in message
    for fault in (
        "line 1: thread: unknown setting; did you mean 'threads'?",
        "line 5: search.warmup: Input should be greater than or equal to 0, got -1",
        "line 3: search.min_seconds: Field required",
        "line 8: budgets.p95: unknown setting; did you mean 'p95_ms'?",
        "line 9: batch: given a second time (first on line 2)",
        "line 10: name: must be the file name, 'bad'",
    ):
        assert fault in message


@pytest.mark.parametrize(("text", "reason"), [("a: [1", "is not YAML"), ("- 1\n", "got list"), ("", "got NoneType")])
def test_files_that_are_no_profile(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(DeviceError, match=reason):
        load_profile(file)
