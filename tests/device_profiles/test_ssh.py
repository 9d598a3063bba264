"""The SSH target against a real OpenSSH server: what it does when all goes well, and who it refuses to talk to."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from secateur.device_profiles import DeviceError, measure, open_target
from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.runtime import DEFAULT, Runtime, runtime_named
from secateur.device_profiles.target import AGENT
from secateur.device_profiles.targets.ssh import Settings, SshTarget, session
from secateur.device_profiles.testing import check_target
from tests.device_profiles import matrix, sshd
from tests.device_profiles.sshd import Device, opened
from tests.device_profiles.tiny import quick_profile, write_conv


def request_for(path: Path, place: str, **changes: Any) -> dict[str, Any]:
    entry = {"name": "m", "path": place, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    request = {"protocol": PROTOCOL, "op": "benchmark", "models": [entry], "provider": "CPUExecutionProvider"}
    request |= {"threads": 1, "warmup": 1, "min_repeats": 3, "min_seconds": 0, "max_seconds": 10, "seed": 0}
    return request | changes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_conv(tmp_path / "conv.onnx")


def test_another_runtime_is_brought_beside_the_agent(device: Device, tmp_path: Path):
    np.save(tmp_path / "a.npy", np.eye(8, dtype=np.float32))
    target = SshTarget(device.settings(), Runtime("matrix", matrix))
    try:
        assert target.prepare()["runtime"]["matrix"] == "1.0"
        answer = target.run(request_for(tmp_path / "a.npy", target.put(tmp_path / "a.npy")), 60)
    finally:
        target.close()
    assert answer["environment"]["matrix"] == "1.0" and "onnxruntime" not in answer["environment"]
    assert [path.name[:15] for path in (device.home / "store").glob("runtime-*")] == ["runtime-matrix-"]


def test_prepare_and_measure(device: Device, tmp_path: Path):
    models = {"dense": write_conv(tmp_path / "a.onnx", 8), "pruned": write_conv(tmp_path / "b.onnx", 4)}
    profile = quick_profile(target="ssh", connect=device.settings().model_dump(mode="json"))
    target = open_target(profile)
    try:
        probe = target.prepare()
        result = measure(target, profile, models, sustain_s=0.3)
    finally:
        target.close()
        target.close()
    assert probe["device"]["machine"] == os.uname().machine
    assert "CPUExecutionProvider" in probe["runtime"]["providers"]
    assert 0 < result.ratio("pruned", "dense").value < 100
    assert all(process.models["pruned"].sustained[0].calls > 0 for process in result.processes)
    store = device.home / "store"
    digest = hashlib.sha256(AGENT.read_bytes()).hexdigest()
    assert (store / f"agent-{digest[:12]}.py").read_bytes() == AGENT.read_bytes()
    runtime = runtime_named(DEFAULT).file.read_bytes()
    assert (store / f"runtime-onnxruntime-{hashlib.sha256(runtime).hexdigest()[:12]}.py").read_bytes() == runtime
    assert store.stat().st_mode & 0o777 == 0o700
    for path in models.values():
        kept = store / "models" / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.onnx"
        assert kept.read_bytes() == path.read_bytes()


def test_nothing_is_sent_twice(device: Device, model: Path, monkeypatch: pytest.MonkeyPatch):
    with opened(device.settings()) as target:
        place = target.put(model)
        monkeypatch.setattr(session._Link, "upload", None)
        assert target.put(model) == place
    with opened(device.settings()) as target:  # nor by the next session, the agent included
        assert target.put(model) == place


def test_a_damaged_agent_is_replaced(device: Device, model: Path):
    with opened(device.settings()) as target:
        target.put(model)
    for agent in (device.home / "store").glob("agent-*.py"):
        agent.write_bytes(b"#" * agent.stat().st_size)
    with opened(device.settings()) as target:
        assert "models" in target.run(request_for(model, target.put(model)), 60)


def test_names_with_everything_in_them(device: Device, tmp_path: Path):
    folder = f'{device.home}/st\'o\\re $(touch pwned) "é" \\'
    paths = [
        write_conv(tmp_path / name, 3 + i)
        for i, name in enumerate(["a b;$(touch pwned)'\"`&|.onnx", "größe-模型.onnx", "-rf", "x.o$nx", "..onnx"])
    ]
    with opened(device.settings(folder=folder)) as target:
        places = [target.put(path) for path in paths]
        assert target.run(request_for(paths[0], places[0]), 60)["models"]["m"]["output_sha256"]
    assert {Path(place).parent for place in places} == {Path(folder, "models")}
    assert [Path(place).read_bytes() for place in places] == [path.read_bytes() for path in paths]
    assert not list(device.home.rglob("pwned"))


def test_events_come_in_the_calling_thread(device: Device, model: Path):
    seen: list[tuple[str, int]] = []
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model))
        target.run(request, 60, lambda event: seen.append((event["event"], threading.get_ident())))
    assert seen[0][0] == "started"
    assert {thread for _, thread in seen} == {threading.get_ident()}


def test_what_progress_raises_ends_the_run(device: Device, model: Path):
    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        raise StopError

    with opened(device.settings()) as target:
        endless = request_for(model, target.put(model), min_repeats=10**9, max_seconds=600)
        with pytest.raises(StopError):
            target.run(endless, 600, stop)
        assert not device.agents()
        assert "models" in target.run(request_for(model, target.put(model)), 60)  # over the same connection
        assert target._worker is not None


def test_fetch(device: Device, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    back = tmp_path / "back.onnx"
    with opened(device.settings()) as target:
        place = target.put(model)
        target.fetch(place, back)
        assert back.read_bytes() == model.read_bytes()
        for path, to, code in (
            (place + "x", back, "no-such-file"),
            (str(device.home), back, "no-such-file"),
            ("/dev/zero", back, "no-such-file"),
            (place, tmp_path / "back.onnx" / "file", "local-file"),
        ):
            with pytest.raises(DeviceError) as caught:
                target.fetch(path, to)
            assert caught.value.code == code
        monkeypatch.setattr(session, "MAX_FETCH_BYTES", 10)
        with pytest.raises(DeviceError, match="larger than") as caught:
            target.fetch(place, back)
        assert caught.value.code == "too-large"
    assert back.read_bytes() == model.read_bytes()  # whole or not at all
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


def test_infer_and_fetch_its_outputs(device: Device, model: Path, tmp_path: Path):
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model)) | {"op": "infer"}
        answer = target.run(request, 60)
        target.fetch(answer["outputs"], tmp_path / "new folder" / "outputs.npz")
        assert Path(answer["outputs"]).exists()
    assert not Path(answer["outputs"]).parent.exists()  # closing removes it
    assert hashlib.sha256((tmp_path / "new folder" / "outputs.npz").read_bytes()).hexdigest() == answer["sha256"]


def test_one_target_from_several_threads(device: Device, tmp_path: Path):
    paths = [write_conv(tmp_path / f"{i}.onnx", 4 + i) for i in range(4)]
    with opened(device.settings()) as target:
        places: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda i=i: places.update({i: target.put(paths[i])})) for i in range(len(paths))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for i, path in enumerate(paths):
            assert Path(places[i]).read_bytes() == path.read_bytes()
        ours = psutil.Process().net_connections("tcp")
        assert len([c for c in ours if c.raddr and c.raddr.port == device.port]) == 1


def test_the_ssh_configuration_is_honoured(device: Device, model: Path, tmp_path: Path):
    text = f"""
Host board
    HostName {device.address}
    Port {device.port}
    User {device.user}
    IdentityFile {device.folder}/id
    UserKnownHostsFile {tmp_path}/known
    HostKeyAlias my-board
Host behind
    HostName {device.address}
    Port {device.port}
    User {device.user}
    IdentityFile {device.folder}/id
    UserKnownHostsFile {tmp_path}/known
    HostKeyAlias my-board
    ProxyJump board
"""
    (tmp_path / "config").write_text(text)
    key = " ".join(device.known_hosts.read_text().split()[1:])
    (tmp_path / "known").write_text(f"my-board {key}\n")
    for host in ("board", "behind"):
        before = device.log.count("Accepted publickey")
        settings = Settings(
            host=host, python=device.python, folder=str(device.home / "store"), config=tmp_path / "config"
        )
        with opened(settings) as target:
            assert Path(target.put(model)).read_bytes() == model.read_bytes()
        assert device.log.count("Accepted publickey") - before == (2 if host == "behind" else 1)


def test_a_relative_folder_lies_in_the_home(device: Device, model: Path):
    if device.uid is None:
        pytest.skip("would write to your home")
    for folder in ("~/.cache/secateur", "else where"):
        with opened(device.settings(folder=folder)) as target:
            place = target.put(model)
            assert "models" in target.run(request_for(model, place), 60)
        assert place.startswith(str(device.home / folder.removeprefix("~/")) + "/models/")


# ---- host keys ----


def refusal(settings: Settings, path: Path | None = None) -> DeviceError:
    with opened(settings) as target, pytest.raises(DeviceError) as caught:
        target.prepare()
    return caught.value


def other_key(folder: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "other"], check=True)
    return folder / "other.pub"


def fingerprint(public: Path) -> str:
    return subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout.split()[1]


@pytest.mark.parametrize("known", ["empty", "missing", "other host"])
def test_an_unknown_host_key_is_refused_and_the_fix_works(device: Device, tmp_path: Path, known: str):
    file = tmp_path / "known hosts"
    if known != "missing":
        file.write_text("" if known == "empty" else device.known_hosts.read_text().replace(device.address, "10.9.9.9"))
    error = refusal(device.settings(known_hosts=file))
    assert error.code == "host-key"
    assert "is unknown" in str(error)
    assert fingerprint(device.folder / "host_key.pub") in str(error)
    assert str(file) in str(error)
    run_fix(error)
    with opened(device.settings(known_hosts=file)) as target:
        assert target.prepare()["device"]


def test_a_changed_host_key_is_refused_and_the_fix_works(device: Device, tmp_path: Path):
    file = tmp_path / "known_hosts"
    sshd.write_known_host(file, device.address, device.port, other_key(tmp_path))
    error = refusal(device.settings(known_hosts=file))
    assert error.code == "host-key"
    assert "has changed" in str(error)
    for public in (device.folder / "host_key.pub", tmp_path / "other.pub"):
        assert fingerprint(public) in str(error)
    run_fix(error)
    with opened(device.settings(known_hosts=file)) as target:
        assert target.prepare()["device"]


def run_fix(error: DeviceError) -> None:
    """What the message says to do once the fingerprint has been compared."""
    command = str(error).partition("only if it is the same, run: ")[2]
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)


def test_a_host_key_of_another_kind_counts_as_changed(device: Device, tmp_path: Path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", tmp_path / "other"], check=True)
    sshd.write_known_host(tmp_path / "known", device.address, device.port, tmp_path / "other.pub")
    error = refusal(device.settings(known_hosts=tmp_path / "known"))
    assert error.code == "host-key"
    assert fingerprint(tmp_path / "other.pub") in str(error)


def test_no_configuration_switches_the_check_off(device: Device, tmp_path: Path):
    config = tmp_path / "config"
    config.write_text("Host *\n  UserKnownHostsFile none\n  StrictHostKeyChecking no\n")
    error = refusal(device.settings(config=config, known_hosts=None))
    assert error.code == "host-key"
    assert "UserKnownHostsFile none" in str(error)
    config.write_text("Host *\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking no\n")
    assert refusal(device.settings(config=config, known_hosts=None)).code == "host-key"
    jump = f"Host jump\n  HostName {device.address}\n  Port {device.port}\n  UserKnownHostsFile none\n"
    config.write_text(jump + "Host board\n  ProxyJump jump\n")
    error = refusal(device.settings(host="board", config=config, known_hosts=None))
    assert error.code == "host-key"


# ---- other refusals ----


def test_a_refused_key(device: Device, tmp_path: Path):
    other_key(tmp_path)
    error = refusal(device.settings(identity=tmp_path / "other"))
    assert error.code == "key-refused"
    assert f"ssh-copy-id -p {device.port} -i {tmp_path}/other.pub {device.user}@{device.address}" in str(error)


def test_a_key_with_a_passphrase_is_left_to_the_agent(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "no agent"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "locked"], check=True)
    error = refusal(device.settings(identity=tmp_path / "locked"))
    assert error.code == "key-refused"
    assert "ssh-add" in str(error)


def test_nothing_listens(device: Device):
    error = refusal(device.settings(port=sshd.free_port()))
    assert error.code == "connection-refused"
    assert "start the SSH server" in str(error)


def test_an_unknown_name(device: Device):
    error = refusal(device.settings(host="no-such-device.invalid", connect_timeout_s=30))
    assert error.code == "unknown-host"


def test_bad_identity_and_configuration(device: Device, tmp_path: Path):
    assert refusal(device.settings(identity=tmp_path / "none")).code == "ssh-config"
    (tmp_path / "config").write_text("Host *\n  Port many\n")
    assert refusal(device.settings(config=tmp_path / "config")).code == "ssh-config"
    (tmp_path / "config").write_text("Host *\n  ProxyJump again\n")
    error = refusal(device.settings(config=tmp_path / "config"))
    assert error.code == "ssh-config"
    assert "jump hosts" in str(error)


@pytest.mark.parametrize(
    "connect",
    [{}, {"host": ""}, {"host": "a", "python": "a\nb"}, {"host": "a", "python": []}, {"host": "a", "strict": False}],
)
def test_settings_that_make_no_sense(connect: dict[str, Any]):
    with pytest.raises(ValidationError):
        Settings(**connect)


def test_python_is_one_program_or_a_list():
    assert Settings(host="a", python="/opt/my python/bin/python").python == ("/opt/my python/bin/python",)
    assert Settings(host="a", python=["env", "A=b", "python3"]).python == ("env", "A=b", "python3")


@pytest.mark.parametrize("word", ["", "plain", "a b", "it's", "back\\slash\\", "\\", "'\\'", "$(x) `y` !z *", "é"])
def test_quoted_words_survive_the_shell(word: str):
    for shell in ("sh", "bash"):
        done = subprocess.run([shell, "-c", f"printf %s {session._quote(word)}"], capture_output=True, check=True)
        assert done.stdout.decode() == word
    assert shlex.split(session._quote(word)) == [word]


def test_what_every_target_promises(device: Device, model: Path):
    check_target(SshTarget(device.settings()), model)


def test_a_closed_target_can_be_used_again(device: Device, model: Path):
    target: SshTarget
    with opened(device.settings()) as target:
        place = target.put(model)
        target.close()
        assert target.put(model) == place
