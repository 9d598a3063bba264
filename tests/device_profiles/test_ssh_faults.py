"""The SSH target when things go wrong: each fault is provoked for real, and leaves nothing behind on the device."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest

from secateur.device_profiles import DeviceError, protocol
from secateur.device_profiles.target import AGENT
from secateur.device_profiles.targets.ssh import Settings, SshTarget, session
from tests.device_profiles import sshd
from tests.device_profiles.proxy import Proxy
from tests.device_profiles.sshd import Device, opened, wait_for
from tests.device_profiles.test_ssh import request_for
from tests.device_profiles.tiny import write_conv

BIG = 2_000_000
ENDLESS = {"min_repeats": 10**9, "max_seconds": 600}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_conv(tmp_path / "conv.onnx")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file that takes several chunks; never the same twice."""
    path = tmp_path / "big.onnx"
    path.write_bytes(os.urandom(BIG))
    return path


def through(proxy: Proxy, device: Device, **changes: Any) -> Settings:
    """The device's settings with the proxy in between."""
    key = device.known_hosts.read_text().partition(" ")[2]
    known = device.folder / f"known_{proxy.port}"
    known.write_text(f"[127.0.0.1]:{proxy.port} {key}")
    return device.settings(**{"port": proxy.port, "known_hosts": known, "keepalive_s": 0.3} | changes)


class Events:
    """Remembers events, and does something once at the first that fits."""

    def __init__(self, name: str = "", act: Callable[[dict[str, Any]], None] = lambda event: None) -> None:
        self.name, self.act = name, act
        self.seen: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.seen.append(event)
        if event["event"] == self.name:
            self.name = ""
            self.act(event)


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(DeviceError) as caught:
        call()
    assert len(str(caught.value)) > 20
    return caught.value.code


# ---- the link ----


def test_a_connection_cut_while_copying_is_made_again(device: Device, big: Path):
    with Proxy(device.port, cut_after=1_000_000, spoilt=1) as proxy, opened(through(proxy, device)) as target:
        place = Path(target.put(big))
        assert place.read_bytes() == big.read_bytes()
        assert proxy.connections == 2
        assert device.parts() == []  # of the first attempt


def test_a_connection_that_is_always_cut(device: Device, big: Path):
    with Proxy(device.port, cut_after=1_000_000) as proxy, opened(through(proxy, device)) as target:
        assert code_of(lambda: target.put(big)) == "transfer-broken"
        assert proxy.connections == 4
        proxy.cut_after = None
        assert Path(target.put(big)).read_bytes() == big.read_bytes()


def test_a_link_that_falls_silent_while_copying(device: Device, big: Path):
    with Proxy(device.port, silence_after=1_000_000, spoilt=1) as proxy, opened(through(proxy, device)) as target:
        began = time.monotonic()
        assert code_of(lambda: target.put(big)) == "link-dead"
        assert time.monotonic() - began < 8
        assert not [file for file in (device.home / "store" / "models").iterdir() if file.stat().st_size == BIG / 2]
        assert Path(target.put(big)).read_bytes() == big.read_bytes()
        assert device.parts() == []


@pytest.mark.long
@pytest.mark.parametrize(("fault", "code"), [("reset", "transfer-broken"), ("silence", "link-dead")])
def test_a_link_lost_while_measuring(device: Device, model: Path, fault: str, code: str):
    with Proxy(device.port) as proxy, opened(through(proxy, device)) as target:
        request = request_for(model, target.put(model))
        events = Events("started", lambda event: getattr(proxy, fault)())
        assert code_of(lambda: target.run(request | ENDLESS, 600, events)) == code
        assert wait_for(lambda: not device.agents())  # the device notices, by its server's own checks
        assert "models" in target.run(request, 60)  # and the lock is free


@pytest.mark.long
def test_a_slow_link_works(device: Device, model: Path, big: Path):
    with Proxy(device.port, delay_s=0.04, rate=4e6) as proxy, opened(through(proxy, device)) as target:
        assert Path(target.put(big)).read_bytes() == big.read_bytes()
        assert "models" in target.run(request_for(model, target.put(model)), 60)


def test_a_server_that_never_speaks(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        settings = Settings(host="127.0.0.1", port=port, known_hosts=tmp_path / "none", connect_timeout_s=0.3)
        with opened(settings) as target:
            assert code_of(target.prepare) == "connect-timeout"


# ---- what runs on the device ----


def test_an_agent_killed_from_outside(device: Device, model: Path):
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model))
        events = Events("started", lambda event: os.kill(event["pid"], signal.SIGKILL))
        assert code_of(lambda: target.run(request | ENDLESS, 600, events)) == "agent-died"
        assert wait_for(lambda: not device.agents())
        assert "models" in target.run(request, 60)


def test_the_agent_reports_its_own_time_out(device: Device, model: Path):
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model))
        assert code_of(lambda: target.run(request | ENDLESS, 1.5)) == "timeout"
        assert "models" in target.run(request, 60)


def hang(device: Device, model: Path) -> None:
    """Stop the agent in the middle, so that it can neither answer nor clean up."""
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model))
        events = Events("started", lambda event: os.kill(event["pid"], signal.SIGSTOP))
        assert code_of(lambda: target.run(request | ENDLESS, 0.8, events)) == "client-timeout"
        assert wait_for(lambda: not [p for p in device.agents() if p.pid == events.seen[0]["pid"]])
        assert wait_for(lambda: not device.agents())
        assert "models" in target.run(request, 60)


def test_a_hung_agent_is_killed(device: Device, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "GRACE_S", 2.0)
    monkeypatch.setattr(session, "END_S", 0.3)
    hang(device, model)


@pytest.mark.long
def test_a_hung_agent_of_root_is_killed(model: Path, monkeypatch: pytest.MonkeyPatch):
    """Signals of the SSH protocol would not do: sshd ignores them for root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    monkeypatch.setattr(session, "GRACE_S", 2.0)
    monkeypatch.setattr(session, "END_S", 0.3)
    with sshd.public_folder() as folder:
        device = sshd.start_device(folder, root_login=True)
        try:
            hang(device, model)
        finally:
            device.close()


def test_closing_ends_a_run(device: Device, model: Path):
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model))
        closing = threading.Thread(target=target.close)
        events = Events("started", lambda event: closing.start())
        assert code_of(lambda: target.run(request | ENDLESS, 600, events)) == "closed"
        closing.join(20)
        assert not device.agents()


CLIENT = """
import json, sys
from pathlib import Path
from secateur.device_profiles.targets.ssh import Settings, SshTarget
target = SshTarget(Settings(**json.loads(sys.argv[1])))
request = json.loads(sys.argv[2])
target.run(request, 600, lambda event: print(json.dumps(event), flush=True))
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_client(device: Device, model: Path, number: signal.Signals):
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model), **ENDLESS)
    before = set((device.home / "store" / "work").glob("*"))
    arguments = [device.settings().model_dump_json(), json.dumps(request)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(AGENT.parents[1]), *filter(None, sys.path)])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], **pipes) as client:
        try:
            assert client.stdout
            event = json.loads(client.stdout.readline())
            assert psutil.pid_exists(event["worker_pid"])
            client.send_signal(number)
            _, errors = client.communicate(timeout=20)
        finally:
            client.kill()
    assert wait_for(lambda: not device.agents(), 5)
    assert wait_for(lambda: set((device.home / "store" / "work").glob("*")) <= before)
    if number == signal.SIGINT:
        assert client.returncode == -signal.SIGINT
        assert errors.count("Traceback") == 1
        assert "KeyboardInterrupt" in errors


def test_two_users_at_once(device: Device, model: Path):
    with opened(device.settings()) as first, opened(device.settings()) as second:
        request = request_for(model, first.put(model))
        assert second.put(model) == request["models"][0]["path"]
        measuring = threading.Event()
        events = Events("progress", lambda event: measuring.set())
        other = threading.Thread(target=lambda: code_of(lambda: first.run(request | ENDLESS, 600, events)))
        other.start()
        assert measuring.wait(20)
        with pytest.raises(DeviceError, match=r"waited 0\.2 s") as caught:
            second.run(request, 60)
        assert caught.value.code == "busy"
        assert str(events.seen[0]["pid"]) in str(caught.value)  # who holds it
        first.close()
        other.join(20)
        assert "models" in second.run(request, 60)


# ---- the store ----


def test_a_corrupted_model_in_the_store_is_replaced(device: Device, model: Path):
    with opened(device.settings()) as target:
        place = Path(target.put(model))
        content = place.read_bytes()
        place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "models" in target.run(request_for(model, target.put(model)), 60)
        assert place.read_bytes() == content


def test_a_model_that_changed_here_is_not_measured(device: Device, model: Path):
    with opened(device.settings()) as target:
        request = request_for(model, target.put(model))
        request["models"][0]["sha256"] = "0" * 64
        assert code_of(lambda: target.run(request, 60)) == "sha256-mismatch"
        model.write_bytes(b"something else")
        assert code_of(lambda: target.run(request, 60)) == "local-file"
        assert device.parts() == []


def test_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    large = tmp_path / "large.onnx"
    large.write_bytes(os.urandom(6_000_000))
    with sshd.public_folder() as folder:
        device = sshd.start_device(folder, small_disk=True)
        models = Path(f"/proc/{device.process.pid}/root{folder}/small/store/models")
        try:
            with opened(device.settings(folder=str(folder / "small" / "store"))) as target:
                with pytest.raises(DeviceError, match=r"4\.\d MB free in .*, 7\.0 MB are needed") as caught:
                    target.put(large)
                assert caught.value.code == "disk-full"
                monkeypatch.setattr(session, "SPARE_BYTES", -(10**9))  # it fills up meanwhile
                assert code_of(lambda: target.put(large)) == "disk-full"
                assert list(models.iterdir()) == []
                monkeypatch.undo()
                assert "models" in target.run(request_for(model, target.put(model)), 60)
        finally:
            device.close()


def test_a_folder_that_cannot_be_written(device: Device, model: Path):
    if device.uid is None:
        pytest.skip("needs root to own a folder that the device's user does not")
    (device.folder / "closed" / "models").mkdir(parents=True)
    for folder in ("/etc/secateur/deep", str(device.folder / "closed"), "/etc/passwd/x"):
        with opened(device.settings(folder=folder)) as target:
            assert code_of(lambda: target.put(model)) == "not-allowed"


# ---- its Python ----


@pytest.mark.parametrize("python", ["/nowhere/python3", "no-such-python", ["env", "no-such-python"]])
def test_no_python(device: Device, python: Any):
    with opened(device.settings(python=python)) as target:
        assert code_of(target.prepare) == "no-python"


def test_a_python_of_another_architecture(device: Device):
    own = Path("/bin/sh").resolve().read_bytes()[:64]
    foreign = device.folder / "foreign-python"
    foreign.write_bytes(own[:18] + (b"\xb7\x00" if own[18:20] != b"\xb7\x00" else b"\x3e\x00") + own[20:64])
    foreign.chmod(0o755)
    for python in (str(foreign), ["env", str(foreign)]):  # the shell says it, or tries to read it as a script
        with opened(device.settings(python=python)) as target:
            assert code_of(target.prepare) == "wrong-arch"


def test_no_runtime(device: Device):
    python = [*device.python[:2], "/usr/bin/env", "-u", "PYTHONPATH", device.python[-1], "-I", "-S"]
    with opened(device.settings(python=python)) as target:
        assert code_of(target.prepare) == "missing-runtime"


# ---- a device that means harm: asyncssh's own server ----


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[sshd.Impostor]:
    with sshd.Impostor(tmp_path / "impostor") as impostor:
        yield impostor


async def endless_line(process: Any) -> None:
    while True:
        process.stdout.write(b"x" * 65536)
        await process.stdout.drain()


async def endless_events(process: Any) -> None:
    while True:
        process.stdout.write(b'{"event": "progress", "text": "' + b"x" * 1000 + b'"}\n')
        await process.stdout.drain()


async def endless_errors(process: Any) -> None:
    while True:
        process.stderr.write(b"x" * 65536)
        await process.stderr.drain()


async def deep(process: Any) -> None:
    process.stdout.write(b"[" * 100_000 + b"\n")
    process.exit(0)


@pytest.mark.parametrize("behaviour", [endless_line, endless_events, endless_errors, deep])
def test_too_much_is_cut_off(hostile: sshd.Impostor, behaviour: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "MAX_REPLY_BYTES", 500_000)
    monkeypatch.setattr(session, "END_S", 0.2)
    monkeypatch.setattr(session, "GRACE_S", 0.5)
    hostile.behaviour = behaviour
    with opened(hostile.settings()) as target:
        assert code_of(lambda: target.run({"op": "probe"}, 30)) == "reply-too-long"


async def escapes(process: Any) -> None:
    process.stdout.write(
        json.dumps({"error": "\x1b[2J", "detail": "\x1b]0;pwned\x07 a\nb" + "x" * 9999}).encode() + b"\n"
    )
    process.exit(1)


def test_a_device_cannot_write_to_the_terminal(hostile: sshd.Impostor):
    hostile.behaviour = escapes
    with opened(hostile.settings()) as target, pytest.raises(DeviceError) as caught:
        target.run({"op": "probe"}, 30)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 5000
    assert caught.value.code == "device-error"


async def gone_at_once(process: Any) -> None:
    process.stderr.write(b"sh: python3: not found")
    process.exit(127)


def test_a_command_that_ends_before_it_is_asked(hostile: sshd.Impostor):
    hostile.behaviour = gone_at_once
    with opened(hostile.settings()) as target:
        for _ in range(10):
            assert code_of(lambda: target.run({"op": "probe"}, 30)) == "no-python"


async def strange_pids(process: Any) -> None:
    process.stdout.write(b'{"event": "started", "pid": "1; reboot", "worker_pid": -1}\n')
    await process.stdout.drain()
    await process.stdin.read()


def test_no_pid_reaches_a_shell_that_is_none(hostile: sshd.Impostor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "END_S", 0.2)
    monkeypatch.setattr(session, "GRACE_S", 0.2)
    hostile.behaviour = strange_pids
    with opened(hostile.settings()) as target:
        assert code_of(lambda: target.run({"op": "probe"}, 0.3)) == "client-timeout"
    assert [command.split()[0] for command in hostile.commands] == ["exec"]


async def silent(process: Any) -> None:
    await process.stdin.read()


@pytest.mark.parametrize(("behaviour", "code"), [(silent, "client-timeout")])
def test_a_device_that_says_nothing(hostile: sshd.Impostor, behaviour: Any, code: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "GRACE_S", 0.2)
    monkeypatch.setattr(session, "END_S", 0.2)
    hostile.behaviour = silent
    with opened(hostile.settings()) as target:
        assert code_of(lambda: target.run({"op": "probe"}, 0.3)) == "client-timeout"


class Lazy(asyncssh.SFTPServer):
    """Opens every file, and then answers no request to read or write."""

    def open(self, *_: Any) -> Any:
        return io.BytesIO()

    async def _never(self, *_: Any) -> Any:
        await asyncio.sleep(3600)

    read = write = _never


def test_a_disk_that_hangs(hostile: sshd.Impostor, big: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "STALL_S", 0.5)
    monkeypatch.setattr(session, "END_S", 0.2)
    hostile.sftp = Lazy
    with opened(hostile.settings()) as target:
        assert code_of(lambda: target.put(big)) == "link-dead"


def test_no_sftp(tmp_path: Path, big: Path):
    with sshd.Impostor(tmp_path / "impostor", sftp=None) as impostor, opened(impostor.settings()) as target:
        assert code_of(lambda: target.put(big)) == "no-session"


def test_closing_what_was_never_opened(hostile: sshd.Impostor):
    target = SshTarget(hostile.settings())
    target.close()
    target.close()
