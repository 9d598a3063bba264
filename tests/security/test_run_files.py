"""A run file or device profile that somebody else wrote: it can choose a run, and nothing beyond."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.device_profiles import DeviceError, load_profile, plain_yaml
from secateur.device_profiles.settle import settle
from secateur.pipeline.config.reading import load_run_file, parse_run_file
from secateur.pipeline.errors import UserError
from secateur.pipeline.run.opening import device_profile, open_workload
from tests.pipeline.helpers import TINY, merged

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
"""'Billion laughs': 80 aliases that stand for 10^8 values."""

TEXTS = {
    "an object": "!!python/object/apply:os.system ['touch {mark}']",
    "a module": "!!python/module:antigravity",
    "a tag of its own": "name: !run x",
    "aliases that multiply": BOMB,
    "an alias within itself": "&a [*a]",
    "an alias within itself, as a mapping": "&a {search: *a}",
    "nested too deep": "[" * 5000,
    "nested too deep by aliases": "a: &a []\n" + "".join(f"b{i}: &a [*a]\n" for i in range(500)),
    "too long": "name: " + "x" * 2_000_000,
    "a number of too many digits": "seed: " + "1" * 5000,
    "a 14th month": "name: 2026-14-01",
    "two documents": "name: a\n---\nname: b",
    "a mapping as a key": "? {a: b}\n: c",
}


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_is_no_run_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    text = TEXTS[name].replace("{mark}", str(mark))
    began = time.process_time()
    with pytest.raises(UserError, match=r"not valid YAML|fault"):
        parse_run_file(text)
    profile = tmp_path / "hostile.yaml"
    profile.write_text(text)
    with pytest.raises(DeviceError, match=r"not YAML|invalid device profile|is a mapping of settings"):
        load_profile(profile)
    assert time.process_time() - began < 30, "it is refused before it is built; unbounded growth would take hours"
    assert not mark.exists()


def test_anchors_of_people_still_work() -> None:
    text = "recipe: &r {epochs: 2, lr: 0.1}\nbaseline: *r\nfinetune: {<<: *r, top: 1}\n"
    data, faults = settle(plain_yaml.read(text).content, {(): {}})
    assert not faults and data["finetune"] == {"epochs": 2, "lr": 0.1, "top": 1}


@pytest.mark.parametrize(
    "name",
    ["../../etc/cron.d/x", "/etc/x", "..", "a/b", "a b", "", "-rf", "a\n", "{{ 7 * 7 }}", "$(id)", "x" * 200, "a'"],
)
def test_a_name_is_no_path_and_no_code(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        parse_run_file(yaml.safe_dump({**TINY, "name": name}))


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "a:b", "it's", 'say "x"', "a' OR name LIKE '%", "a\\", "a`b", "a\nb", "%", "a.b", "x" * 300],
)
def test_a_registered_name_is_no_path_and_no_query(name: str) -> None:
    with pytest.raises(UserError, match="registered_model"):
        parse_run_file(yaml.safe_dump({**TINY, "tracking": {"registered_model": name}}))


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("baseline.epochs", ".inf", "finite"),
        ("baseline.lr", ".nan", "finite"),
        ("search.budget.seconds", "1e999", "finite"),
        ("search.options.step", ".inf", "finite"),
        ("search.options.deep", "[{a: [.nan]}]", "finite"),
        ("seed", "1" * 40, "seed"),
        ("seed", "-1", "seed"),
        ("threads", "1000000", "threads"),
        ("tracking.experiment", '"\\e[2J\\e]0;mine\\a"', "control characters"),
        ("device.profile", '"quick\\0.yaml"', "control characters"),
        ("workload.data.source", '"digits\\r"', "control characters"),
    ],
)
def test_values_that_no_run_can_have(key: str, value: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        parse_run_file(yaml.safe_dump(TINY), overrides=[f"{key}={value}"])
    assert all(c.isprintable() or c == "\n" for c in str(caught.value)), "nothing of it reaches the terminal raw"


def test_a_profile_is_found_by_name_in_its_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    outside = tmp_path / "outside.yaml"
    outside.write_text("target: local\n")
    (tmp_path / "home/devices").mkdir(parents=True)
    for name in ("../../outside", "/etc/passwd", "../outside"):
        config = parse_run_file(yaml.safe_dump(merged(TINY, {"device": {"profile": name}})))
        with pytest.raises(UserError, match="unknown device profile"):
            device_profile(config)


def test_a_profile_that_is_another_kind_of_file_shows_nothing_of_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("- hunter2\n- hunter3\n")
    config = parse_run_file(yaml.safe_dump(merged(TINY, {"device": {"profile": str(secret)}})))
    with pytest.raises(UserError) as caught:
        device_profile(config)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["nosuch", "os", "../digits", "__class__", "__builtins__", "DatasetFolder", "VisionDataset"]
)
def test_a_source_of_images_is_a_data_set_and_nothing_else(source: str, tmp_path: Path) -> None:
    data = {"source": source, "root": str(tmp_path)}
    with pytest.raises(UserError):
        config = parse_run_file(yaml.safe_dump({**TINY, "workload": {**TINY["workload"], "data": data}}))
        open_workload(config)


@pytest.mark.parametrize("name", ["os", "../images", "classification.os", "weights", "__init__"])
@pytest.mark.parametrize("place", ["workload.name", "search.method", "workload.model.name", "reward.preset"])
def test_names_import_nothing(name: str, place: str) -> None:
    with pytest.raises(UserError):
        config = parse_run_file(yaml.safe_dump(TINY), overrides=[f"{place}={name}"])
        open_workload(config).build_model()


HOSTILE_WORDS = [
    ("host", "x; touch {mark}"),
    ("host", "-oProxyCommand=touch {mark}"),
    ("host", "$(touch {mark})"),
    ("user", "`touch {mark}`"),
    ("user", "-oProxyCommand=touch {mark}"),
    ("folder", "a; touch {mark}"),
    ("python", "python3 && touch {mark}"),
    ("identity", "| touch {mark}"),
    ("known_hosts", "$(touch {mark})"),
    ("config", "| touch {mark}"),
]


@pytest.mark.parametrize(("key", "text"), HOSTILE_WORDS)
def test_words_of_a_profile_reach_no_shell_of_this_machine(key: str, text: str, tmp_path: Path) -> None:
    """What they do on the device itself is in tests/device_profiles/test_ssh.py (quoted words survive the shell)."""
    from secateur.device_profiles import open_target

    mark = tmp_path / "executed"
    connect: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "connect_timeout_s": 5.0, "config": "/dev/null"}
    connect[key] = text.replace("{mark}", str(mark))
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump({"target": "ssh", "connect": connect}))
    target = open_target(load_profile(file))
    with pytest.raises(DeviceError):
        target.prepare()
    target.close()
    assert not mark.exists()


def test_a_local_python_is_started_without_a_shell(tmp_path: Path) -> None:
    from secateur.device_profiles import open_target

    mark = tmp_path / "executed"
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump({"target": "local", "connect": {"python": [f"python3; touch {mark}"]}}))
    with pytest.raises(DeviceError, match="cannot start"):
        open_target(load_profile(file)).prepare()
    assert not mark.exists()


def test_the_command_says_it_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMB)
    command = [sys.executable, "-m", "secateur", "validate", str(file)]
    env = {**os.environ, "SECATEUR_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 2 and "values, aliases counted in full" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_file_of_another_user_stays_unread(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read run file"):
        load_run_file(tmp_path)
