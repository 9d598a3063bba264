from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from secateur.device_profiles import DeviceError, known_profiles, load_profile
from secateur.device_profiles.profile import Multiples
from secateur.device_profiles.target import is_template, require_complete


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


def test_the_last_timing_is_strict_unless_a_profile_says_otherwise(tmp_path: Path):
    assert all(
        load_profile(path).final.strict and not load_profile(path).search.strict for path in known_profiles().values()
    )
    own = "final: {processes: 3, warmup: 1, min_repeats: 5, min_seconds: 0}\n"
    (tmp_path / "own.yaml").write_text(own)
    assert load_profile(tmp_path / "own.yaml").final.retries == 5
    assert load_profile(tmp_path / "own.yaml").final.strict
    (tmp_path / "lax.yaml").write_text(own.replace("0}", "0, strict: false}"))
    assert not load_profile(tmp_path / "lax.yaml").final.strict


def test_profiles_are_frozen():
    with pytest.raises(ValidationError):
        load_profile("local").threads = 2


def test_unknown_name_suggests_a_close_one_and_lists_the_known(tmp_path: Path):
    with pytest.raises(DeviceError, match=r"'lokal'.*Did you mean 'local'\?.*Known: .*local") as caught:
        load_profile("lokal")
    assert caught.value.code == "profile"
    with pytest.raises(DeviceError, match=r"Known: .*local"):
        load_profile("raspberry", [tmp_path])


def test_extra_folder_and_path(tmp_path: Path):
    file = tmp_path / "board.yaml"
    file.write_text("threads: 2\nbudgets:\n  p95_ms: 12.5\n  size_bytes: 1000\n")
    assert load_profile("board", [tmp_path]).budgets.p95_ms == 12.5
    assert load_profile(file) == load_profile("board", [tmp_path])
    assert known_profiles([tmp_path])["board"] == file
    with pytest.raises(DeviceError, match=r"cannot read.*none\.yaml"):
        load_profile(tmp_path / "none.yaml")


def test_an_earlier_profiles_precision_is_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """It was a setting once; profiles that have it, and what was kept about their devices, stay good."""
    file = tmp_path / "board.yaml"
    file.write_text("threads: 2\nprecision: int8\n")
    assert load_profile(file).threads == 2
    load_profile(file)
    (said,) = caplog.messages
    assert str(file) in said and "precision is ignored" in said


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


# ------------------------------------------------------------------------------------------------------------- extends


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


BASE = """
description: A board
target: ssh
threads: 4
channel_multiple: 4
connect: {user: pi, python: [/opt/python], port: 2222}
facts: {arch: aarch64, ram_mb: 1024}
sources: [a data sheet]
search: {processes: 1, warmup: 2, min_repeats: 5, min_seconds: 0.1}
budgets: {p50_ms: 10}
"""


def test_a_profile_inherits_what_it_does_not_say_itself(tmp_path: Path):
    write(tmp_path, "base", BASE)
    write(
        tmp_path,
        "mine",
        "extends: base\nthreads: 2\nconnect: {host: kitchen, port: 22}\nfacts: {ram_mb: 2048}\nsources: [the shop]\n"
        "search: {min_repeats: 7}\nbudgets: {p95_ms: 30}\n",
    )
    mine = load_profile("mine", [tmp_path])
    assert (mine.name, mine.description, mine.threads, mine.channel_multiple) == ("mine", "A board", 2, 4)
    assert mine.connect == {"user": "pi", "python": ["/opt/python"], "port": 22, "host": "kitchen"}
    assert mine.facts == {"arch": "aarch64", "ram_mb": 2048}
    assert mine.sources == ("a data sheet", "the shop")
    assert (mine.search.min_repeats, mine.search.warmup, mine.budgets.p50_ms, mine.budgets.p95_ms) == (7, 2, 10, 30)


def test_a_device_can_be_based_on_a_device_based_on_a_board(tmp_path: Path):
    write(tmp_path, "mine", "extends: raspberry-pi-5\nconnect: {host: a}\n")
    write(tmp_path, "fast", "extends: mine\nthreads: 4\n")
    fast, board = load_profile("fast", [tmp_path]), load_profile("raspberry-pi-5")
    assert fast == board.model_copy(update={"name": "fast", "threads": 4, "connect": {"host": "a"}})
    assert load_profile(tmp_path / "fast.yaml") == fast  # bases are looked for beside the file, too


def test_one_kind_of_layer_can_be_set_on_top_of_a_single_number(tmp_path: Path):
    write(tmp_path, "base", "channel_multiple: 16\n")
    write(tmp_path, "mine", "extends: base\nchannel_multiple: {depthwise: 4}\n")
    assert load_profile("mine", [tmp_path]).multiples == Multiples(conv=16, pointwise=16, depthwise=4, linear=16)


def test_settings_of_another_target_are_not_inherited(tmp_path: Path):
    write(tmp_path, "base", BASE)
    write(tmp_path, "mine", "extends: base\ntarget: local\n")
    assert load_profile("mine", [tmp_path]).connect == {}


def test_a_profile_that_extends_its_own_name_means_the_one_it_hides(tmp_path: Path):
    write(tmp_path, "local", "extends: local\nthreads: 2\n")
    mine = load_profile("local", [tmp_path])
    assert mine == load_profile("local").model_copy(update={"threads": 2})


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"mine": "threads: 1\nextends: lokal\n"}, r"line 2: extends: unknown device profile 'lokal'.*mean 'local'"),
        ({"mine": "extends: mine\n"}, "line 1: extends: the profile 'mine' extends itself"),
        ({"mine": "extends: b\n", "b": "extends: mine\n"}, "mine -> b -> mine is a circle"),
        ({"mine": "extends: b\n", "b": "threads: 0\n"}, r"line 1: extends: invalid device profile .*b\.yaml"),
        ({"mine": "extends: local\nthreads: 0\n"}, "line 2: threads: .* got 0"),
        ({"mine": "extend: local\n"}, "line 1: extend: unknown setting; did you mean 'extends'"),
        ({"mine": "extends: [local]\n"}, "line 1: extends: unknown device profile"),
    ],
)
def test_a_base_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, files: dict[str, str], fault: str):
    for name, text in files.items():
        write(tmp_path, name, text)
    with pytest.raises(DeviceError, match=fault) as caught:
        load_profile("mine", [tmp_path])
    assert caught.value.code == "profile"


# ------------------------------------------------------------------------------------------- channel multiples, connect


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("0", "channel_multiple: must be a whole number from 1, or one per kind of layer (conv, "),
        ("many", "got 'many'"),
        ("2.5", "got 2.5"),
        ("[8, 4]", "got [8, 4]"),
        ("{conv: 0}", "channel_multiple.conv: must be a whole number from 1, got 0"),
        ("{depthwize: 4}", "channel_multiple.depthwize: unknown kind of layer; did you mean 'depthwise'?"),
        ("{colour: 4}", "known: conv, pointwise, depthwise, linear"),
    ],
)
def test_a_wrong_channel_multiple_is_one_plain_fault(tmp_path: Path, value: str, fault: str):
    with pytest.raises(DeviceError) as caught:
        load_profile(write(tmp_path, "mine", f"threads: 1\nchannel_multiple: {value}\n"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("  line 2: ")
    assert fault in lines[1]


def test_channel_multiples_per_kind(tmp_path: Path):
    file = write(tmp_path, "mine", "channel_multiple: {conv: 16, depthwise: 4}\n")
    assert load_profile(file).multiples == Multiples(conv=16, depthwise=4)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("target: loc\n", "line 1: target: unknown target 'loc'. Did you mean 'local'? Known: local, ssh."),
        ("target: ssh\nconnect:\n  hots: a\n", "line 3: connect.hots: unknown setting; did you mean 'host'?"),
        ("connect: {cpu_share: 2}\n", "line 1: connect.cpu_share: Input should be less than or equal to 1, got 2"),
        ("connect: 3\n", "line 1: connect: Input should be a valid dictionary, got 3"),
        ("target: 3\n", "line 1: target: expected text, got 3"),
    ],
)
def test_the_connect_section_is_checked_by_its_target(tmp_path: Path, text: str, fault: str):
    with pytest.raises(DeviceError) as caught:
        load_profile(write(tmp_path, "mine", text))
    assert fault in str(caught.value)


def test_a_template_loads_but_cannot_be_used(tmp_path: Path):
    board = load_profile("raspberry-pi-5")
    assert is_template(board)
    with pytest.raises(
        DeviceError, match="needs a host: secateur devices add NAME --from raspberry-pi-5 --host"
    ) as caught:
        require_complete(board)
    assert caught.value.code == "profile"
    mine = load_profile(write(tmp_path, "mine", "extends: raspberry-pi-5\nconnect: {host: kitchen}\n"))
    assert not is_template(mine)
    require_complete(mine)


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeviceError, match="UTF-8"):
        load_profile(tmp_path / "bad.yaml")
