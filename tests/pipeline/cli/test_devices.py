"""``secateur devices`` and ``secateur benchmark`` as a user meets them; measured for real on this machine only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from secateur import device_profiles
from secateur.device_profiles import BenchmarkResult, DeviceError, load_profile
from secateur.device_profiles.profile import Multiples
from secateur.pipeline import errors
from secateur.pipeline.cli import app as cli
from secateur.pipeline.cli.devices import parity
from tests.device_profiles.test_check import GOOD
from tests.device_profiles.tiny import write_conv
from tests.export.test_received import HOSTILE, hostile
from tests.pipeline.helpers import quick_device

Captured = pytest.CaptureFixture[str]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's own devices."""
    own = tmp_path / "home" / "devices"
    own.mkdir(parents=True)
    return own


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Call:
    """Run ``secateur ARGUMENTS`` in this process: exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def flat(text: str) -> str:
    """Without line breaks and frames."""
    return " ".join(text.replace("│", " ").split())


class FakeTarget:
    """A device that answers a probe, and nothing else."""

    def __init__(self, answer: Mapping[str, Any] | DeviceError) -> None:
        self.answer, self.closed = answer, False

    def prepare(self) -> Mapping[str, Any]:
        if isinstance(self.answer, DeviceError):
            raise self.answer
        return self.answer

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    """Every device is this one."""
    target = FakeTarget(GOOD)
    monkeypatch.setattr(device_profiles, "open_target", lambda profile: target)
    return target


# ---------------------------------------------------------------------------------------------------- list, show, help


@pytest.mark.parametrize("command", ["", "list", "show", "check", "add", "remove", "benchmark", "probe"])
def test_help_teaches_by_example(call: Call, command: str) -> None:
    code, out, _ = call("devices", *command.split(), "--help")
    assert code == 0
    assert f"secateur devices {command or 'add'}" in flat(out)
    assert all(len(line) <= 80 for line in out.splitlines())


def test_list_tells_devices_from_templates(call: Call, folder: Path) -> None:
    (folder / "kitchen.yaml").write_text("extends: raspberry-pi-5\nconnect: {host: 10.0.0.5, user: pi, port: 2222}\n")
    (folder / "emulated.yaml").write_text("extends: local\ntiming: false\n")
    (folder / "broken.yaml").write_text("threads: many\n")
    (folder / "kitchen.probe.json").write_text("{}")
    code, out, _ = call("devices", "list")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["kitchen"] == ["kitchen", "ssh", "pi@10.0.0.5:2222", "CPU", "1", "yes"]
    assert lines["local"][-1] == "no"
    assert "unusable: broken.yaml: line 1: threads" in flat(out)
    assert "emulated: no times" in out
    assert "needs a host: secateur devices add NAME --from THIS --host" in flat(out)
    assert out.index("templates") < out.index("jetson-orin-nano")
    assert all(len(line) <= 80 for line in out.splitlines())


def test_list_for_programs(call: Call, folder: Path) -> None:
    (folder / "kitchen.yaml").write_text("extends: raspberry-pi-5\nconnect: {host: kitchen}\n")
    (folder / "broken.yaml").write_text("- 1\n")
    entries = {entry["name"]: entry for entry in json.loads(call("devices", "list", "--json")[1])}
    assert entries["kitchen"] == {
        "name": "kitchen",
        "fault": "",
        "template": False,
        "file": str(folder / "kitchen.yaml"),
        "target": "ssh",
        "host": "kitchen",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "timing": True,
        "calibrated": False,
        "description": load_profile("raspberry-pi-5").description,
    }
    assert entries["raspberry-pi-5"]["template"]
    assert "mapping" in entries["broken"]["fault"]


def test_the_short_list_knows_profiles_based_on_ones_own(call: Call, folder: Path) -> None:
    (folder / "base.yaml").write_text("description: My base\n")
    (folder / "mine.yaml").write_text("extends: base\n")
    (folder / "broken.yaml").write_text("extends: nothing\n")
    code, out, _ = call("list", "devices")
    assert code == 0
    assert out.count("My base") == 2
    assert "unusable: broken.yaml: line 1: extends: unknown device profile" in flat(out)
    assert "needs a host" in out


def test_show_prints_a_profile_that_can_be_read_again(call: Call, folder: Path, tmp_path: Path) -> None:
    (folder / "kitchen.yaml").write_text("extends: raspberry-pi-5\nconnect: {host: kitchen}\nthreads: 2\n")
    code, out, _ = call("devices", "show", "kitchen")
    assert code == 0
    copy = tmp_path / "kitchen.yaml"
    copy.write_text(out)
    assert load_profile(copy) == load_profile("kitchen", [folder])
    assert yaml.safe_load(out)["facts"]["cpu"][0]["core"] == "Cortex-A76"
    assert "secateur devices probe kitchen" in out


# ------------------------------------------------------------------------------------------------ check, add and remove


def test_this_machine_is_ready(call: Call) -> None:
    code, out, _ = call("devices", "check", "local")
    assert code == 0
    assert "local is ready" in out
    assert "onnxruntime" in out


def test_check_names_what_is_missing_and_the_fix(call: Call, folder: Path, device: FakeTarget) -> None:
    (folder / "kitchen.yaml").write_text("extends: raspberry-pi-5\nconnect: {host: kitchen}\n")
    device.answer = {**GOOD, "runtime": {}}
    code, out, _ = call("devices", "check", "kitchen")
    assert code == errors.EXIT_SURROUNDINGS
    assert "pip install onnxruntime" in flat(out)
    assert "kitchen is not ready: 1 missing" in flat(out)
    fixes = [line for line in out.splitlines() if line.startswith("onnxruntime, fix: ")]
    assert len(fixes) == 1 and "python -m pip install onnxruntime numpy" in fixes[0], "unbroken, so it can be copied"
    assert all(len(line) <= 80 for line in out.splitlines() if line not in fixes)
    assert device.closed
    code, out, _ = call("devices", "check", "kitchen", "--json")
    assert code == errors.EXIT_SURROUNDINGS
    assert [c["name"] for c in json.loads(out) if c["status"] == "missing"] == ["onnxruntime"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "lokal"), "did you mean 'local'"),
        (("show", "raspbery-pi-5"), "did you mean 'raspberry-pi-5'"),
        (("check", "broken"), "line 1: threads"),
        (("probe", "raspberry-pi-5"), "devices add NAME --from raspberry-pi-5 --host"),
        (("benchmark", "none.onnx"), "no model file at none.onnx"),
        (("benchmark", "tiny.onnx", "--tier", "quick"), "choose search"),
        (("benchmark", "tiny.onnx", "--device", "emulated"), "--parity"),
        (("benchmark", "tiny.onnx", "--device", "rk3588"), "needs a host"),
        (("probe", "emulated"), "times of an emulator mean nothing"),
        (("remove", "local"), "shipped with Secateur"),
        (("remove", "none"), "your own are: base, broken, emulated, heir"),
        (("remove", "../x"), "no device"),
        (("remove", "base"), "heir extends base"),
        (("add", "a/b", "--from", "local"), "cannot be a device's name"),
        (("add", "x.yaml", "--from", "local"), "cannot be a device's name"),
        (("add", "base", "--from", "local"), "--force"),
        (("add", "local", "--from", "generic-arm64", "--host", "a"), "shipped profile"),
        (("add", "x", "--from", "generic-arm64"), "--host user@address"),
        (("add", "x", "--from", "local", "--host", "a"), "--from generic-arm64"),
        (("add", "x", "--from", "nothing", "--host", "a"), "unknown device profile"),
        (("add", "x", "--from", "generic-arm64", "--host", "a b"), "is no address"),
        (("add", "x", "--from", "generic-arm64", "--host", "a:99999"), "is no address"),
        (("add", "x", "--from", "generic-arm64", "--host", "a", "--python", "'"), "--python"),
        (("add", "x"), "--from"),
    ],
)
def test_mistakes_get_one_message_and_code_2(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_conv(tmp_path / "tiny.onnx")
    (folder / "base.yaml").write_text("description: base\n")
    (folder / "heir.yaml").write_text("extends: base\n")
    (folder / "broken.yaml").write_text("threads: many\n")
    (folder / "emulated.yaml").write_text("extends: local\ntiming: false\n")
    before = sorted(folder.iterdir())
    code, _, err = call("devices", *arguments)
    assert code == errors.EXIT_USER
    assert said.lower() in flat(err).lower()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_models_are_refused_in_a_sentence_before_a_device_is_asked(
    call: Call, tmp_path: Path, kind: str
) -> None:
    file, said = hostile(kind, tmp_path)
    for arguments in ((file,), (file, "--parity"), (write_conv(tmp_path / "tiny.onnx"), "--against", file)):
        code, out, err = call("devices", "benchmark", *arguments)
        assert code == errors.EXIT_USER and not out
        assert said in flat(err) and "Traceback" not in err


def test_a_board_in_one_command(call: Call, folder: Path, device: FakeTarget) -> None:
    python = "/opt/my env/python"
    arguments = ("--host", "pi@192.168.1.20:2222", "--threads", "4", "--python", f"'{python}' -u")
    code, out, _ = call("devices", "add", "kitchen", "--from", "raspberry-pi-5", *arguments)
    assert code == 0
    kitchen = load_profile("kitchen", [folder])
    assert kitchen.connect == {"host": "192.168.1.20", "user": "pi", "port": 2222, "python": [python, "-u"]}
    assert (kitchen.threads, kitchen.description) == (4, load_profile("raspberry-pi-5").description)
    assert "secateur devices probe kitchen" in flat(out)
    code, out, _ = call("devices", "remove", "kitchen")
    assert code == 0
    assert not list(folder.iterdir())


def test_a_device_may_be_called_like_the_board_it_is(call: Call, folder: Path) -> None:
    code, _, _ = call("devices", "add", "rk3588", "--from", "rk3588", "--host", "[fe80::1]:22", "--no-check")
    assert code == 0
    assert load_profile("rk3588", [folder]).connect == {"host": "fe80::1", "port": 22}
    assert load_profile("rk3588", [folder]).facts == load_profile("rk3588").facts


def test_a_device_out_of_reach_comes_with_advice_and_its_profile_stays(
    call: Call, folder: Path, device: FakeTarget
) -> None:
    device.answer = DeviceError("its host key is unknown: SHA256:abc; compare it", "host-key")
    code, out, _ = call("devices", "add", "kitchen", "--from", "generic-arm64", "--host", "kitchen")
    assert code == errors.EXIT_SURROUNDINGS
    assert "SHA256:abc; compare it" in flat(out)
    assert "secateur devices check kitchen" in flat(out)
    assert (folder / "kitchen.yaml").is_file()
    assert call("devices", "add", "kitchen", "--from", "local", "--force", "--no-check")[0] == 0
    assert load_profile("kitchen", [folder]).target == "local"


def test_a_profile_that_turns_out_not_valid_is_taken_back(call: Call, folder: Path) -> None:
    (folder / "kitchen.yaml").write_text("extends: local\n")
    wrong = ("--host", "kitchen", "--python", "''", "--force")
    code, _, err = call("devices", "add", "kitchen", "--from", "generic-arm64", *wrong)
    assert code == errors.EXIT_USER
    assert "connect.python" in err
    assert (folder / "kitchen.yaml").read_text() == "extends: local\n"


def test_an_emulator_is_added_as_one(call: Call, folder: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "a folder" / "python"
    spaced.parent.mkdir()
    spaced.symlink_to(sys.executable)
    ways = {str(spaced): [str(spaced)], f"qemu-aarch64 '{spaced}'": ["qemu-aarch64", str(spaced)]}
    for i, (given, expected) in enumerate(ways.items()):
        arguments = ("--python", given, "--emulated", "--no-check")
        assert call("devices", "add", f"fake{i}", "--from", "local", *arguments)[0] == 0
        profile = load_profile(f"fake{i}", [folder])
        assert not profile.timing
        assert profile.connect == {"python": expected}


# ---------------------------------------------------------------------------------------------------- benchmark, parity


def test_a_model_is_timed_against_another(call: Call, folder: Path, tmp_path: Path) -> None:
    quick_device(folder)
    model, baseline = write_conv(tmp_path / "compact.onnx", 4), write_conv(tmp_path / "baseline.onnx", 1024)
    raw = tmp_path / "raw.json"
    arguments = ("--against", baseline, "--device", "quick", "--tier", "search", "--json", raw)
    code, out, err = call("benchmark", model, *arguments)
    assert code == 0
    for word in ("p50 latency", "p99 latency", "p50 CPU time", "first call", "loading", "peak memory", "file size"):
        assert word in out
    assert "Ratio: 0." in out
    assert "Speed-up: " in out
    assert "an interval needs 3 processes" in out
    assert "timing on quick" in err
    result = BenchmarkResult.from_json(raw.read_text())
    assert result.names == ("baseline.onnx", "compact.onnx")
    assert len(result.wall_ms("compact.onnx")) >= 3
    assert all(len(line) <= 100 for line in out.splitlines() if "Written" not in line)


def test_a_ratio_is_measured_until_it_is_known_well_enough(call: Call, folder: Path, tmp_path: Path) -> None:
    quick_device(folder)
    model, baseline = write_conv(tmp_path / "compact.onnx", 4), write_conv(tmp_path / "baseline.onnx", 64)
    arguments = ("benchmark", model, "--against", baseline, "--device", "quick")
    assert "7 processes on quick" in call(*arguments, "--within", 1000)[1]
    assert "1 process on quick" in call(*arguments, "--within", 0.01, "--seconds", 0.01)[1]
    assert "name the other model with --against" in call("benchmark", model, "--within", 1)[2]


def test_a_single_model_and_the_longer_name_of_the_command(call: Call, folder: Path, tmp_path: Path) -> None:
    quick_device(folder)
    model = write_conv(tmp_path / "compact.onnx", 4)
    code, out, _ = call("devices", "benchmark", model, "--device", "quick")
    assert code == 0
    assert "3 processes on quick, tier final" in out
    assert "Ratio" not in out


def test_files_of_the_same_name_are_told_apart(call: Call, folder: Path, tmp_path: Path) -> None:
    quick_device(folder)
    (tmp_path / "a").mkdir()
    model, baseline = write_conv(tmp_path / "m.onnx", 4), write_conv(tmp_path / "a" / "m.onnx", 8)
    code, out, _ = call("benchmark", model, "--against", baseline, "--device", "quick", "--tier", "search")
    assert code == 0
    assert "Ratio" in out


def test_an_emulator_is_compared_with_this_machine(call: Call, folder: Path, tmp_path: Path) -> None:
    (folder / "emulated.yaml").write_text(f"extends: local\ntiming: false\nconnect: {{python: ['{sys.executable}']}}\n")
    model = write_conv(tmp_path / "m.onnx")
    code, out, _ = call("benchmark", model, "--device", "emulated", "--parity", "--trust")
    assert code == 0
    assert "(1, 4, 8, 8)" in out
    assert "The same" in out


@pytest.mark.parametrize(("shift", "code"), [(1e-6, 0), (0.1, errors.EXIT_GATE), (np.nan, errors.EXIT_GATE)])
def test_outputs_that_differ_by_more_than_rounding_end_with_3(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, code: int
) -> None:
    (folder / "emulated.yaml").write_text("extends: local\ntiming: false\n")
    here = np.array([[0.0, 2.0, 1.0], [3.0, 0.5, 1.0]], dtype=np.float32)
    answers = iter([{"logits": here + np.float32(shift)}, {"logits": here}])  # the device's, then ours
    monkeypatch.setattr(parity, "_outputs", lambda target, profile, model: next(answers))
    found, out, _ = call("benchmark", write_conv(tmp_path / "m.onnx"), "--device", "emulated", "--parity")
    assert found == code
    assert "logits" in out
    assert ("Not the same" in out) == (code != 0)


def test_differences_are_relative_to_the_largest_value() -> None:
    here = np.array([[1.0, -4.0], [2.0, 1.0]])
    assert parity.compare(here, here) == (0.0, "100%")
    assert parity.compare(here + np.array([[0.0, 0.0], [0.0, 2.0]]), here) == (0.5, "50%")
    assert parity.compare(here[:1], here)[0] == float("inf")
    assert parity.compare(np.zeros(3), np.zeros(3)) == (0.0, "-")
    masked = np.array([[-np.inf, np.nan], [2.0, 1.0]])
    assert parity.compare(masked, masked)[0] == 0.0
    assert parity.compare(masked, here)[0] == parity.compare(here, masked)[0] == float("inf")
    assert parity.compare(None, here) == (float("inf"), "no such output there")


# ---------------------------------------------------------------------------------------------------------------- probe


def test_what_a_probe_finds_is_kept_beside_the_profile(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, device: FakeTarget
) -> None:
    from secateur.device_profiles import calibration, staircase

    (folder / "kitchen.yaml").write_text("extends: raspberry-pi-5\nconnect: {host: kitchen}\n")
    multiples = Multiples(conv=16, pointwise=8, depthwise=4, linear=1)
    found = SimpleNamespace(
        multiples=multiples,
        summary=lambda: [("conv", "multiples of 16")],
        to_json=lambda: "{}",
        noise_floor=None,
        curves={"conv": {47: 2.0, 48: 1.0}},
    )
    asked: list[tuple[str, str]] = []

    def probe(
        target: Any, profile: Any, *, seconds: float, progress: Callable[[int, int, str], None], **precise: str
    ) -> Any:
        assert (target, profile.name, seconds) == (device, "kitchen", 5.0)
        asked.append((precise["precision"], precise["scheme"]))
        progress(1, 1, "conv: multiples of 16")
        return SimpleNamespace(**vars(found), precision=precise["precision"])

    monkeypatch.setattr(staircase, "probe", probe)
    assert call("devices", "probe", "kitchen", "--seconds", 5, "--precision", "int8")[0] == 0
    assert (folder / "kitchen.probe-int8.json").is_file()
    (folder / "bathroom.yaml").write_text("extends: kitchen\nruntime: ncnn\n")
    assert "loads no ONNX" in call("devices", "probe", "bathroom", "--precision", "int8")[2]
    (folder / "bathroom.yaml").unlink()
    code, out, err = call("devices", "probe", "kitchen", "--seconds", 5)
    assert code == 0
    assert asked == [("int8", "U8S8"), ("fp32", "")]
    assert "multiples of 16" in out
    assert "channel_multiple: {conv: 16, pointwise: 8, depthwise: 4, linear: 1}" in out
    assert "probe kitchen" in err
    assert "47 channels, 2.00x" in (folder / "kitchen.probe.html").read_text()
    assert calibration.path_of(folder, load_profile("kitchen", [folder])).is_file()
    listed = {e["name"]: e for e in json.loads(call("devices", "list", "--json")[1])}
    assert listed["kitchen"]["calibrated"]
    assert "calibrated: " in call("devices", "show", "kitchen")[1]
    assert call("devices", "remove", "kitchen")[0] == 0
    assert not list(folder.iterdir())
