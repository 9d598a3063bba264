"""Devices for the tests of the SSH target: a real OpenSSH server on loopback, and asyncssh's own in this process.

The real one serves an ordinary user. Run by root, it lives in a mount namespace whose /etc/passwd has that user, so the
machine gets none; run by anybody else, it serves that user.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest

from secateur.device_profiles.targets.ssh import Settings, SshTarget

PARTS = Path(__file__).parents[2] / ".parts" / "sshd"
UID = 47_110
FAR_HOST, FAR_DEVICE = "10.77.113.1", "10.77.113.2"
CONFIG = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
Subsystem sftp internal-sftp
ClientAliveInterval 1
ClientAliveCountMax 1
MaxStartups 50
"""
# A namespace of its own: mounts made here end with it.
START = """
set -e
folder=$1; uid=$2; shift 2
mount --bind "$folder/passwd" /etc/passwd
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
for disk in "$folder"/small*; do
    [ ! -d "$disk" ] || mount -t tmpfs -o size=4m,mode=777 tmpfs "$disk"
done
if [ "$uid" != 0 ]; then exec setpriv --reuid "$uid" --regid "$uid" --clear-groups "$@"; fi
exec "$@"
"""


@dataclass
class Device:
    """A device that can be logged in to.

    Args:
        folder: readable by everybody; removed in the end.
        user: whom it serves; his home is ``folder/home``.
        uid: his number; None = this process's.
        python: starts a Python with onnxruntime for him, with a device lock of its own.
    """

    folder: Path
    user: str
    uid: int | None
    port: int
    python: tuple[str, ...]
    process: subprocess.Popen[bytes]
    address: str = "127.0.0.1"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()

    def settings(self, **changes: Any) -> Settings:
        given: dict[str, Any] = {"host": self.address, "port": self.port, "user": self.user, "python": self.python}
        given |= {"folder": str(self.home / "store"), "known_hosts": self.known_hosts, "identity": self.folder / "id"}
        given |= {"config": self.folder / "ssh_config", "keepalive_s": 1, "connect_timeout_s": 10, "busy_wait_s": 0.2}
        return Settings(**given | changes)

    def sessions(self) -> list[psutil.Process]:
        """Every process that a login has started: agents, workers and what serves them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def agents(self) -> list[psutil.Process]:
        """The agents and workers that run, wherever they hang in the tree of processes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.folder) in word and "agent-" in word for word in process.cmdline()[1:]):
                    found.append(process)
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def parts(self) -> list[Path]:
        """Unfinished files in the device's folders."""
        return sorted(self.home.rglob("*.part"))

    def close(self) -> None:
        """End the server and every session of it."""
        for process in [*self.sessions(), *self.agents()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.terminate()
        self.process.wait(10)


def find_sshd() -> tuple[str, str]:
    """The server's absolute path and where its libraries are; skips the test if there is none."""
    for place in (shutil.which("sshd"), "/usr/sbin/sshd"):
        if place and os.access(place, os.X_OK):
            return str(Path(place).resolve()), ""
    if (PARTS / "installed").exists():
        return str(PARTS / "usr/sbin/sshd"), libraries()
    pytest.skip("needs OpenSSH's server; run tests/tools/install_sshd.sh")


def libraries() -> str:
    """``LD_LIBRARY_PATH`` for what tests/tools/install_sshd.sh has installed."""
    return ":".join(sorted({str(file.parent) for file in PARTS.rglob("*.so*")}))


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as server:
        server.bind((address, 0))
        return int(server.getsockname()[1])


def python_for(uid: int | None, lock: Path) -> tuple[str, ...]:
    """A command that starts a Python with onnxruntime as that user; skips the test if there is none."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    own = ["env", f"SECATEUR_LOCKS={lock}", sys.executable]
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    system = ["env", f"SECATEUR_LOCKS={lock}", f"PYTHONPATH={':'.join(packages)}", f"/usr/bin/{version}"]
    bare = {"PATH": os.defpath}  # a login inherits nothing of this process's environment
    as_user: dict[str, Any] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
    for command in (own, system):
        with contextlib.suppress(OSError):
            test = subprocess.run(
                [*command, "-c", "import onnxruntime"], capture_output=True, cwd="/", env=bare, **as_user
            )
            if test.returncode == 0:
                return tuple(command)
    pytest.skip(f"no Python with onnxruntime that user {uid} can start")


def start_device(folder: Path, root_login: bool = False, small_disk: bool = False, wrap: Sequence[str] = ()) -> Device:
    """Start a server for an ordinary user (or root) with its files in ``folder``, which everybody must be able to read.

    Args:
        root_login: serve root; needs root.
        small_disk: mount a disk of 4 MB at ``folder/small``; needs root.
        wrap: command that starts the server elsewhere (``ip netns exec ...``).
    """
    program, path = find_sshd()
    is_root = os.geteuid() == 0
    uid = UID if is_root and not root_login else None
    user = "root" if root_login else "device" if is_root else getpass.getuser()
    for name in ("home", "lock", *(["small"] if small_disk else [])):
        (folder / name).mkdir()
        if uid:
            os.chown(folder / name, uid, uid)
    for name in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized_keys").write_text((folder / "id.pub").read_text())
    (folder / "sshd.log").touch()
    (folder / "ssh_config").touch()
    if uid:
        for name in ("host_key", "sshd.log"):
            os.chown(folder / name, uid, uid)
    address = FAR_DEVICE if wrap else "127.0.0.1"
    port = 2222 if wrap else free_port()
    (folder / "sshd_config").write_text(CONFIG.format(port=port, folder=folder, address=address))
    write_known_host(folder / "known_hosts", address, port, folder / "host_key.pub")
    if is_root:
        _write_accounts(folder, uid)
    server = [*(["env", f"LD_LIBRARY_PATH={path}"] if path else []), program, "-D"]
    server += ["-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    python = python_for(uid, folder / "lock")
    namespace = ["unshare", "--mount", "sh", "-c", START, "sh", str(folder), str(uid or 0)] if is_root else []
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen([*wrap, *namespace, *server], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    device = Device(folder, user, uid, port, python, process, address)
    wait_for(lambda: "Server listening" in device.log or process.poll() is not None)
    if process.poll() is not None:
        pytest.skip(f"the SSH server does not start here: {(folder / 'start.log').read_text()} {device.log}")
    return device


def _write_accounts(folder: Path, uid: int | None) -> None:
    lines = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(("root:", "sshd:"))]
    lines.append(f"root:*:0:0::{folder / 'home'}:/bin/sh")
    lines.append("sshd:*:47111:65534::/run/sshd:/usr/sbin/nologin")
    if uid:
        lines.append(f"device:*:{uid}:{uid}::{folder / 'home'}:/bin/bash")
    (folder / "passwd").write_text("\n".join(lines) + "\n")
    noise = "echo 'Welcome to the device!'; echo '{\"not\": the answer'; echo '[1]'\n"
    (folder / "home" / ".bashrc").write_text(noise)  # bash reads it when sshd starts it


def write_known_host(file: Path, address: str, port: int, public: Path) -> None:
    """A known_hosts file with one key."""
    kind, key, *_ = public.read_text().split()
    file.write_text(f"[{address}]:{port} {kind} {key}\n")


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> bool:
    """Whether something became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="secateur-sshd-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def board() -> Iterator[Device]:
    """A device behind a real SSH server, for an ordinary user."""
    with public_folder() as folder:
        device = start_device(folder)
        try:
            yield device
        finally:
            device.close()


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[SshTarget]:
    target = SshTarget(settings)
    try:
        yield target
    finally:
        target.close()


class Impostor:
    """A device that does what a test says: asyncssh's server in this process; a context manager.

    Args:
        folder: becomes its file system.
        sftp: class of its SFTP server; None = it has none.

    Attributes:
        behaviour: coroutine function that gets the process of every command.
        commands: what it was asked to run.
    """

    def __init__(self, folder: Path, sftp: type[asyncssh.SFTPServer] | None = asyncssh.SFTPServer) -> None:
        self.folder, self.sftp = folder, sftp
        self.behaviour: Callable[[Any], Awaitable[None]] | None = None
        self.commands: list[str] = []
        (folder / "root").mkdir(parents=True)
        for name in ("host_key", "id"):
            asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(folder / name))
            asyncssh.read_private_key(str(folder / name)).write_public_key(str(folder / f"{name}.pub"))
        (folder / "ssh_config").touch()

    def settings(self, **changes: Any) -> Settings:
        write_known_host(self.folder / "known_hosts", "127.0.0.1", self.port, self.folder / "host_key.pub")
        given: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "user": "nobody"}
        given |= {"known_hosts": self.folder / "known_hosts", "identity": self.folder / "id"}
        return Settings(**given | {"config": self.folder / "ssh_config", "busy_wait_s": 0} | changes)

    def __enter__(self) -> Impostor:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="impostor")
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda *_: None)
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[str(self.folder / "host_key")],
            authorized_client_keys=str(self.folder / "id.pub"),
            process_factory=self._run,
            sftp_factory=self._sftp if self.sftp else None,
            encoding=None,
        )
        self.port = server.get_port()
        started.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.wait([*others, asyncio.create_task(server.wait_closed())], timeout=1)

    def _sftp(self, channel: Any) -> asyncssh.SFTPServer:
        assert self.sftp
        return self.sftp(channel, chroot=str(self.folder / "root"))

    async def _run(self, process: Any) -> None:
        self.commands.append(process.command)
        if self.behaviour:
            with contextlib.suppress(OSError, asyncssh.Error):
                await self.behaviour(process)
