"""What is done with a device over SSH: one connection, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import logging
import queue
import re
import shlex
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import asyncssh

from secateur.device_profiles.answers import checked
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.protocol import CANCEL_LINE, Reader, hung, request_line
from secateur.device_profiles.runtime import Runtime
from secateur.device_profiles.target import AGENT, Progress
from secateur.device_profiles.targets.ssh.settings import DEFAULT_FOLDER, DEFAULT_PYTHON, Settings

T = TypeVar("T")
Work = Callable[["_Session", Progress | None], Coroutine[Any, Any, T]]
Event = Mapping[str, Any]

KEEPALIVE_COUNT = 3
CHUNK_BYTES = 512 * 1024
SPARE_BYTES = 1_000_000  # left free on the device's disk
MAX_FETCH_BYTES = 1024**3
PUT_RETRIES = 3
STALL_S = 60.0  # for one request or one chunk, on a link that otherwise answers
GRACE_S = 5.0  # beyond its time-out, for an agent that reports it
END_S = 2.0  # for an agent to clean up after it was told to stop
CLOSE_S = 15.0
MAX_HOPS = 8
ERROR_CHARS = 4000
SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

FOREIGN = "this program on the device is built for another machine; set connect.python of the device profile"

log = logging.getLogger(__name__)


class Worker:
    """The thread with the event loop on which everything of one target happens."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._session = _Session(settings, runtime)
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="secateur-ssh", daemon=True)
        self._thread.start()
        self._loop = started.result()

    def wait(self, work: Work[T], progress: Progress | None) -> T:
        """Do ``work`` on the loop; meanwhile pass its events to ``progress`` in the calling thread.

        Raises:
            DeviceError: the work's, or the target was closed meanwhile.
        """
        inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        started: Future[asyncio.Task[T]] = Future()

        def begin() -> None:
            task = self._loop.create_task(work(self._session, inbox.put if progress else None))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: inbox.put(None))
            started.set_result(task)

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError as error:
            raise DeviceError("the target was closed meanwhile", "closed") from error
        try:
            for event in self._events(inbox):
                if progress:
                    progress(event)
        except BaseException:  # KeyboardInterrupt above all: the work ends on the device before it ends here
            self._cancel(started, inbox)
            raise
        try:
            return started.result().result()
        except asyncio.CancelledError as error:
            raise DeviceError("the target was closed meanwhile", "closed") from error
        except DeviceError as error:
            raise _plain(error) from error

    def stop(self) -> None:
        """End all work and close the connection, within ``CLOSE_S``."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_S)

    def _events(self, inbox: queue.SimpleQueue[Event | None]) -> Iterator[Event]:
        """What comes until the work has ended."""
        while True:
            try:
                event = inbox.get(timeout=1.0)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise DeviceError("the target was closed meanwhile", "closed") from None
            if event is None:
                return
            yield event

    def _cancel(self, started: Future[asyncio.Task[T]], inbox: queue.SimpleQueue[Event | None]) -> None:
        with contextlib.suppress(RuntimeError, queue.Empty):
            self._loop.call_soon_threadsafe(lambda: started.result().cancel())
            while inbox.get(timeout=CLOSE_S) is not None:
                pass

    def _serve(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._live(started))
        except OSError as error:
            if started.done():
                raise
            started.set_exception(DeviceError(f"on this machine: no event loop: {error}", "local-file"))

    async def _live(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        loop = asyncio.get_running_loop()
        # A broken connection leaves one exception for every request under way; the first has been reported.
        loop.set_exception_handler(lambda _, context: log.debug("asyncssh: %s", context))
        started.set_result(loop)
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S / 2)
        await self._session.close()


class _Session:
    """What is done with the device, on the loop."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings, self.runtime = settings, runtime
        self._lock = asyncio.Lock()
        self._link: _Link | None = None
        self._placed: dict[str, tuple[Path, str, int]] = {}  # by path on the device
        self._left: set[str] = set()  # folders that answers named, for ``fetch``
        self._litter: set[str] = set()  # unfinished files on the device, those included that a lost connection left

    async def put(self, path: Path, digest: str, size: int) -> str:
        for attempt in range(PUT_RETRIES):
            with contextlib.suppress(_BrokenError):
                return await self._put(path, digest, size)
            await asyncio.sleep(0.2 * 2**attempt)
        return await self._put(path, digest, size)

    async def run(self, request: Mapping[str, Any], timeout_s: float, report: Progress | None) -> dict[str, Any]:
        try:
            return await self._run(request, timeout_s, report)
        except DeviceError as error:
            models = [model for model in request.get("models") or () if isinstance(model, Mapping)]
            stale = {str(model.get("path")) for model in models} & self._placed.keys()
            if error.code != "sha256-mismatch" or not stale:
                raise
        for place in sorted(stale):  # what lies there under the right name and size has the wrong content
            await self._put(*self._placed[place], trust=False)
        return await self._run(request, timeout_s, report)

    async def fetch(self, path: str, to: Path) -> None:
        part = to.parent / f".{to.name}.{uuid.uuid4().hex}.part"
        link = await self._ready()
        try:
            with _faults(link, f"fetching {path}"):
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("xb") as file:
                    await link.download(path, file)
                part.replace(to)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    async def close(self) -> None:
        if self._link:
            if not self._link.lost:
                await self._link.remove_folders(self._left)
            await self._link.close()

    async def _ready(self) -> _Link:
        """The connection, with the folders and the agent in place."""
        async with self._lock:
            if self._link is None or self._link.lost:
                link = await _Link.open(self.settings)
                try:
                    with _faults(link, "preparing the device"):
                        await self._settle(link)
                except BaseException:
                    await link.close()
                    raise
                self._link = link
            return self._link

    async def _settle(self, link: _Link) -> None:
        """Remove what our own broken transfers left, bring the agent and the runtime's file."""
        while self._litter:
            await link.remove(self._litter.pop())
        link.agent = await self._bring(link, AGENT, "agent")
        link.runtime = await self._bring(link, self.runtime.file, f"runtime-{self.runtime.name}")

    async def _bring(self, link: _Link, file: Path, name: str) -> str:
        """Bring a file of code unless the very same lies there; returns its path on the device."""
        code = file.read_bytes()
        digest = hashlib.sha256(code).hexdigest()
        place = f"{link.folder}/{name}-{digest[:12]}.py"
        if await link.read(place, len(code) + 1) != code:
            await self._upload(link, io.BytesIO(code), place, digest, len(code))
        return place

    async def _put(self, path: Path, digest: str, size: int, trust: bool = True) -> str:
        link = await self._ready()
        suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,16}", path.suffix) else ""
        place = f"{link.folder}/models/{digest}{suffix}"
        with _faults(link, f"copying {path.name} to the device"):
            if not trust or await link.size(place) != size:
                with path.open("rb") as file:
                    await self._upload(link, file, place, digest, size)
        self._placed[place] = (path, digest, size)
        return place

    async def _upload(self, link: _Link, source: BinaryIO, place: str, digest: str, size: int) -> None:
        """Bring a file under a temporary name; it gets its own when it is whole."""
        await link.require_space(size + SPARE_BYTES)
        part = f"{place}.{uuid.uuid4().hex}.part"
        self._litter.add(part)
        try:
            if await link.upload(source, part) != digest:
                raise DeviceError("the file was changed while it was copied; try again", "local-file")
            if await link.size(part) != size:
                raise _BrokenError("the device kept only a part of the file; see whether its disk is sound")
            await link.rename(part, place)
            self._litter.discard(part)
        except TimeoutError:
            link.drop()
            raise
        except asyncssh.SFTPError as error:
            if not link.lost:  # a full disk is reported as a mere "Failure"
                await link.require_space(CHUNK_BYTES, error)
            raise
        finally:
            if part in self._litter and not link.lost:
                await link.remove(part)
                self._litter.discard(part)

    async def _run(self, request: Mapping[str, Any], timeout_s: float, report: Progress | None) -> dict[str, Any]:
        link = await self._ready()
        words = link.agent_command(self.settings)
        reader = Reader(report)
        python = None if self.settings.python == DEFAULT_PYTHON else link.python(self.settings)
        runtime = self.runtime.fields(link.runtime)
        line = request_line({"timeout_s": timeout_s, **request}, python=python, **runtime)
        with _faults(link, "running the agent"):
            status = await link.talk(words, line, reader, timeout_s)
            try:
                answer: dict[str, Any] = checked(str(request.get("op")), reader.answer(*status))
            except DeviceError as error:
                if error.code in ("no-python", "wrong-arch", "agent-died") and await link.is_foreign(words):
                    raise DeviceError(f"{FOREIGN}: {shlex.join(words)}", "wrong-arch") from error
                raise
        work = str(answer.get("work", ""))
        if "work" not in request and Path(work).parent == Path(link.folder, "work"):
            self._left.add(work)
        return answer


class _BrokenError(DeviceError):
    """The connection broke off; trying again may help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "transfer-broken")


class _Watcher(asyncssh.SSHClient):
    """Remembers which host key was refused, and why the connection ended."""

    def __init__(self) -> None:
        self.refused: asyncssh.SSHKey | None = None
        self.error: Exception | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Asked for a key that no known_hosts file has: never trusted."""
        self.refused = key
        return False

    def validate_host_ca_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Asked for a certificate authority that no known_hosts file has: never trusted."""
        self.refused = key
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc


@dataclass
class _Link:
    """One connection, its SFTP session and where things lie on the device."""

    connection: asyncssh.SSHClientConnection
    watcher: _Watcher
    hops: list[asyncssh.SSHClientConnection]
    sftp: asyncssh.SFTPClient
    home: str
    folder: str
    agent: str = ""
    runtime: str = ""
    dropped: bool = False

    @classmethod
    async def open(cls, settings: Settings) -> _Link:
        """Connect, log in, make the folders.

        Raises:
            DeviceError: why that is not possible, and what to do.
        """
        road = _Road(settings)
        try:
            watcher = _Watcher()
            connection = await road.connect(settings.host, settings.port, settings.user, watcher)
            with _faults(None, "starting SFTP on the device"):
                async with asyncio.timeout(STALL_S):
                    sftp = await connection.start_sftp_client(path_errors="surrogateescape")
                    home = str(await sftp.realpath("."))
                    folder = _absolute(settings.folder, home)
                    await _make_folder(sftp, f"{folder}/models")
        except BaseException:
            road.abort()
            raise
        return cls(connection, watcher, road.opened[:-1], sftp, home, folder)

    @property
    def lost(self) -> bool:
        return self.dropped or self.connection.is_closed()

    def drop(self) -> None:
        """Give the connection up."""
        self.dropped = True
        for connection in (self.connection, *reversed(self.hops)):
            connection.abort()

    async def close(self) -> None:
        """Say good-bye, briefly."""
        with contextlib.suppress(asyncssh.Error, OSError):
            async with asyncio.timeout(END_S):
                for connection in (self.connection, *reversed(self.hops)):
                    connection.close()
                    await connection.wait_closed()
        self.drop()

    def python(self, settings: Settings) -> list[str]:
        """What starts the device's Python, as words."""
        return [_absolute(word, self.home) if word.startswith("~/") else word for word in settings.python]

    def agent_command(self, settings: Settings) -> list[str]:
        """What starts the agent, as words."""
        store = [] if settings.folder == DEFAULT_FOLDER else ["env", f"SECATEUR_AGENT_STORE={self.folder}"]
        return [*store, *self.python(settings), self.agent]

    async def talk(
        self, words: list[str], line: str, reader: Reader, timeout_s: float
    ) -> tuple[int | None, str | None]:
        """Run a command, with ``line`` on its stdin, to its end; returns its exit code and its signal.

        Its stdin stays open meanwhile. Whatever ends this call early ends the command as well.

        Raises:
            DeviceError: it takes longer than ``timeout_s`` and some grace, or says too much.
        """
        command = "exec " + " ".join(map(_quote, words))
        async with asyncio.timeout(STALL_S):
            process = await self.connection.create_process(command, encoding=None)
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code tells why
                    process.stdin.write(line.encode())
                await _together(_pump(process.stdout, reader.feed), _pump(process.stderr, reader.feed_stderr))
                await process.wait_closed()
        except BaseException as error:
            await self._end(process, reader)
            if isinstance(error, TimeoutError):
                raise hung(timeout_s) from None
            raise
        if self.lost:
            raise asyncssh.ConnectionLost("Connection lost")
        return process.exit_status, process.exit_signal[0] if process.exit_signal else None

    async def _end(self, process: asyncssh.SSHClientProcess[bytes], reader: Reader) -> None:
        """Tell the agent to stop; kill it if it does not; give the connection up if even that fails.

        The SSH protocol's own signals are no use: sshd ignores them for root.
        """
        if self.lost:
            return
        rest = asyncio.gather(_pump(process.stdout), _pump(process.stderr), return_exceptions=True)
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(CANCEL_LINE.encode())
                process.stdin.write_eof()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_S):
                    return await process.wait_closed()
            async with asyncio.timeout(GRACE_S):
                await self._kill(reader.pids)
                await process.wait_closed()
        except (asyncssh.Error, OSError):
            self.drop()
        finally:
            rest.cancel()

    async def _kill(self, pids: list[int]) -> None:
        """Kill the worker's process group and the agent, through a second channel."""
        if pids:
            command = f"kill -9 {' '.join(map(str, pids))}"
            command += f"; kill -s KILL -- -{pids[0]}" if len(pids) > 1 else ""  # not every shell knows -9 --
            null = asyncssh.DEVNULL
            process = await self.connection.create_process(command, stdin=null, stdout=null, stderr=null)
            await process.wait_closed()

    async def upload(self, source: BinaryIO, place: str) -> str:
        """Copy everything to a new file; returns the SHA-256 of what was sent."""
        digest = hashlib.sha256()
        async with asyncio.timeout(STALL_S) as deadline, self._opened(place, "xb") as file:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                await file.write(chunk)
                deadline.reschedule(asyncio.get_running_loop().time() + STALL_S)
        return digest.hexdigest()

    async def download(self, place: str, target: BinaryIO) -> None:
        """Copy everything of a regular file.

        Raises:
            DeviceError: it is none, or too large.
        """
        async with asyncio.timeout(STALL_S) as deadline:
            if (await self.sftp.stat(place)).type != asyncssh.FILEXFER_TYPE_REGULAR:
                raise DeviceError(f"{place} on the device is no regular file", "no-such-file")
            async with self._opened(place, "rb") as file:
                taken = 0
                while chunk := await file.read(CHUNK_BYTES):
                    taken += len(chunk)
                    if taken > MAX_FETCH_BYTES:
                        size = f"{MAX_FETCH_BYTES // 1024**2} MiB"
                        raise DeviceError(f"{place} on the device is larger than {size}; not fetched", "too-large")
                    target.write(chunk)
                    deadline.reschedule(asyncio.get_running_loop().time() + STALL_S)

    async def read(self, place: str, limit: int) -> bytes | None:
        """The first ``limit`` bytes of a file; None if there is none."""
        with contextlib.suppress(asyncssh.SFTPNoSuchFile):
            async with asyncio.timeout(STALL_S), self._opened(place, "rb") as file:
                return bytes(await file.read(limit))
        return None

    async def size(self, place: str) -> int | None:
        """Bytes of a file; None if there is none."""
        with contextlib.suppress(asyncssh.SFTPNoSuchFile):
            async with asyncio.timeout(STALL_S):
                return (await self.sftp.stat(place)).size
        return None

    async def rename(self, place: str, new: str) -> None:
        """Give a file another name, in one step; one that has that name is replaced."""
        async with asyncio.timeout(STALL_S):
            await self.sftp.posix_rename(place, new)

    async def remove(self, place: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(asyncssh.SFTPError, TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await self.sftp.remove(place)

    async def remove_folders(self, places: set[str]) -> None:
        """Remove folders and what is in them, in little time; the agent sweeps what is left another day."""
        with contextlib.suppress(asyncssh.Error, OSError):
            async with asyncio.timeout(GRACE_S):
                for place in places:
                    await self.sftp.rmtree(place, ignore_errors=True)

    async def require_space(self, need: int, cause: Exception | None = None) -> None:
        """See that the folder's disk has ``need`` bytes free; a device that does not tell passes.

        Raises:
            DeviceError: it has not.
        """
        try:
            async with asyncio.timeout(STALL_S):
                disk = await self.sftp.statvfs(self.folder)
        except asyncssh.SFTPOpUnsupported:
            return
        free = disk.bavail * disk.frsize
        if free < need:
            text = f"the device's disk has {free / 1e6:.1f} MB free in {self.folder}, {need / 1e6:.1f} MB are needed"
            raise DeviceError(f"{text}; free some, or set connect.folder to another disk", "disk-full") from cause

    async def is_foreign(self, words: list[str]) -> bool:
        """Whether a program of a command is an executable of another architecture than the device's own shell.

        Shells differ in what they say of one; some even read it as a script.
        """
        with contextlib.suppress(asyncssh.SFTPError, TimeoutError):
            own = _machine(await self.read("/bin/sh", 20))
            programs = [_machine(await self.read(word, 20)) for word in words if word.startswith("/")]
            return own is not None and any(program not in (None, own) for program in programs)
        return False

    @contextlib.asynccontextmanager
    async def _opened(self, place: str, mode: str) -> AsyncIterator[Any]:
        file = await self.sftp.open(place, mode)
        try:
            yield file
        finally:  # not asyncssh's own context manager: that would wait for a device that does not answer
            with contextlib.suppress(asyncssh.Error, OSError):
                async with asyncio.timeout(END_S):
                    await file.close()


class _Road:
    """The way to a device, over the jump hosts that the user's SSH configuration names."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.opened: list[asyncssh.SSHClientConnection] = []

    def abort(self) -> None:
        for connection in reversed(self.opened):
            connection.abort()

    async def connect(
        self,
        host: str,
        port: int | None,
        user: str | None,
        watcher: _Watcher,
        through: asyncssh.SSHClientConnection | None = None,
        depth: int = 0,
    ) -> asyncssh.SSHClientConnection:
        """Connect to a host, and before that to the hosts before it.

        Args:
            watcher: learns which host key is refused and why the connection ends.
            through: the connection to reach it by, if the one before it is known already.
            depth: hosts that have named this one as a jump host.

        Raises:
            DeviceError: why that is not possible, and what to do.
        """
        if depth > MAX_HOPS:
            raise DeviceError(f"more than {MAX_HOPS} jump hosts; does one name itself by 'Host *'?", "ssh-config")
        last = depth == 0
        given = self._given(host, port, user, last)
        try:
            options = await asyncssh.SSHClientConnectionOptions.construct(**given)
            place = _Place(options, self.settings, last)
        except (ValueError, OSError) as error:
            raise DeviceError(f"cannot use the SSH configuration for {host}: {error}", "ssh-config") from error
        if through is None and isinstance(options.tunnel, str):
            for hop in filter(None, options.tunnel.split(",")):
                name, hop_port, hop_user = _split_hop(hop)
                through = await self.connect(name, hop_port, hop_user, _Watcher(), through, depth + 1)
        given |= {"tunnel": through, "known_hosts": place.known, "client_factory": lambda: watcher}
        given |= {"connect_timeout": self.settings.connect_timeout_s, "login_timeout": self.settings.connect_timeout_s}
        given |= {"keepalive_interval": self.settings.keepalive_s, "keepalive_count_max": KEEPALIVE_COUNT}
        try:
            try:
                connection = await asyncssh.connect(**given)
            except (asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost, ConnectionError):
                if not place.trusted():
                    raise
                # Asked for the kinds of key that are known only, a server without one hangs up: see what it has.
                connection = await asyncssh.connect(**given, server_host_key_algs="default")
        except Exception as error:  # a server that breaks the protocol can raise anything in asyncssh
            raise place.refusal(error, watcher) from error
        self.opened.append(connection)
        return connection

    def _given(self, host: str, port: int | None, user: str | None, last: bool) -> dict[str, Any]:
        """What the profile says, and what no configuration may turn on towards a device; the rest is asyncssh's."""
        given: dict[str, Any] = {"host": host, "agent_forwarding": False, "x11_forwarding": False}
        given |= {"gss_kex": False, "gss_auth": False, "request_pty": False, "command": None}
        if port is not None:
            given["port"] = port
        if user is not None:
            given["username"] = user
        if self.settings.config:
            given["config"] = [str(self.settings.config.expanduser())]
        if self.settings.identity and last:
            given["client_keys"] = [str(self.settings.identity.expanduser())]
            given["ignore_encrypted"] = True  # the agent may have it open
        return given


class _Place:
    """A host as the SSH configuration describes it, with the host keys that are trusted there.

    Raises:
        DeviceError: the configuration switches the check of host keys off.
        ValueError, OSError: a known_hosts file cannot be read.
    """

    def __init__(self, options: asyncssh.SSHClientConnectionOptions, settings: Settings, last: bool) -> None:
        self.settings = settings
        self.host, self.port, self.user = options.host, options.port, options.username
        self.alias = options.host_key_alias
        named: Any = options.known_hosts
        if named is None and not settings.known_hosts:
            raise DeviceError(
                f"the SSH configuration for {self.host} switches the check of host keys off (UserKnownHostsFile none); "
                "measuring needs it: name a file there or in connect.known_hosts",
                "host-key",
            )
        usual = [Path(name) for name in named or ("~/.ssh/known_hosts", SYSTEM_KNOWN_HOSTS)]
        own = [settings.known_hosts] if settings.known_hosts else []
        self.files = [file.expanduser() for file in (own if own and last else [*own, *usual])]
        self.known = asyncssh.read_known_hosts([str(file) for file in self.files if file.is_file()])

    @property
    def name(self) -> str:
        """The host's name in a known_hosts file."""
        name = self.alias or self.host
        return name if self.alias or self.port == 22 else f"[{name}]:{self.port}"

    def refusal(self, error: Exception, watcher: _Watcher) -> DeviceError:
        """Why connecting failed, with the fix."""
        where = f"{self.host} port {self.port}"
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return self._distrust(error, watcher.refused)
        if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in str(error):
            return self._no_entry()
        if isinstance(error, TimeoutError):
            waited = f"{where} did not answer within {self.settings.connect_timeout_s:g} s"
            text = f"{waited}; see that the device is on and reachable, or raise connect.connect_timeout_s"
            return DeviceError(text, "connect-timeout")
        if isinstance(error, socket.gaierror):
            text = f"no address is known for {self.host!r} ({error.strerror}); correct connect.host, or add an alias"
            return DeviceError(f"{text} of that name to ~/.ssh/config", "unknown-host")
        if f"[Errno {errno.ECONNREFUSED}]" in str(error):
            text = f"{where} refuses connections; start the SSH server there (sudo systemctl enable --now ssh)"
            return DeviceError(f"{text}, or correct connect.port", "connection-refused")
        if isinstance(error, ConnectionError | asyncssh.ConnectionLost):
            text = f"{where} closed the connection before login ({error}); see the log of the SSH server there"
            return DeviceError(f"{text}, and whether something else listens on that port", "connection-closed")
        if isinstance(error, asyncssh.ChannelOpenError):
            text = f"the jump host cannot reach {where}: {error}; correct its address in the SSH configuration"
            return DeviceError(text, "unreachable")
        if isinstance(error, OSError):
            return DeviceError(f"{where} cannot be reached: {error}; see whether it is in this network", "unreachable")
        return DeviceError(f"no SSH connection to {where}: {type(error).__name__}: {error}", "ssh-failed")

    def trusted(self, known: asyncssh.SSHKnownHosts | None = None) -> list[asyncssh.SSHKey]:
        """The keys that known_hosts files have for this host, and the authorities for its certificate."""
        keys, authorities, *_ = (known or self.known).match(
            self.alias or self.host, "", None if self.port == 22 else self.port
        )
        return [key for key in (*keys, *authorities) if isinstance(key, asyncssh.SSHKey)]

    def _distrust(self, error: Exception, shown: asyncssh.SSHKey | None) -> DeviceError:
        """The error for a host key that is unknown, changed or revoked."""
        holders = [file for file in self.files if file.is_file() and self.trusted(_read_known(file))]
        file = str((holders or self.files)[0])
        trusted = ", ".join(sorted(map(_describe, self.trusted())))
        shows = f"it shows {_describe(shown)}" if shown else str(error)
        add = shlex.join(["echo", f"{self.name} {_public(shown)}"]) + f" >> {shlex.quote(file)}" if shown else ""
        if trusted:
            fault = f"the host key of {self.name} has changed: {shows}, but {file} has {trusted}. The device was "
            fault += "installed anew, or somebody stands between. "
            fix = " && ".join(filter(None, [shlex.join(["ssh-keygen", "-R", self.name, "-f", file]), add]))
        else:
            fault = f"the host key of {self.name} is unknown: {shows}, and {file} has none for it. "
            fix = add or shlex.join(["ssh-keyscan", "-p", str(self.port), self.host]) + f" >> {shlex.quote(file)}"
        check = (
            "Compare it on the device's own console (for f in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf $f; done)"
        )
        return DeviceError(f"{fault}{check}; only if it is the same, run: {fix}", "host-key")

    def _no_entry(self) -> DeviceError:
        identity = self.settings.identity
        tried = f"{identity} and the keys of the agent" if identity else "those of ~/.ssh and of the agent"
        words = ["ssh-copy-id", "-p", str(self.port), *(["-i", f"{identity}.pub"] if identity else [])]
        fix = shlex.join([*words, f"{self.user}@{self.host}"])
        return DeviceError(
            f"{self.host} lets {self.user} in with none of the keys that were tried ({tried}); bring yours there "
            f"({fix}), open one that has a passphrase (ssh-add), or set connect.user and connect.identity",
            "key-refused",
        )


def _read_known(file: Path) -> asyncssh.SSHKnownHosts:
    return asyncssh.read_known_hosts(str(file))


async def _make_folder(sftp: asyncssh.SFTPClient, folder: str) -> None:
    """Make a folder, and those around it that are missing, for this user alone.

    Raises:
        DeviceError: that cannot be done.
    """
    if not await sftp.isdir(folder):
        with contextlib.suppress(asyncssh.SFTPPermissionDenied, asyncssh.SFTPFailure, asyncssh.SFTPNoSuchFile):
            await sftp.makedirs(folder, asyncssh.SFTPAttrs(permissions=0o700), exist_ok=True)
        if not await sftp.isdir(folder):
            fix = "see that its disk has space, or set connect.folder to a place where this user may write"
            raise DeviceError(f"the device makes no folder {folder}; {fix}", "not-allowed")


def _describe(key: asyncssh.SSHKey) -> str:
    return f"{key.get_fingerprint()} ({key.get_algorithm()})"


def _public(key: asyncssh.SSHKey) -> str:
    """``ssh-ed25519 AAAA...``, without a comment."""
    return " ".join(key.export_public_key().decode().split()[:2])


def _split_hop(text: str) -> tuple[str, int | None, str | None]:
    """``[user@]host[:port]`` of ProxyJump -> host, port, user."""
    user, _, place = text.strip().removeprefix("ssh://").rpartition("@")
    match = re.fullmatch(r"\[(?P<v6>[^]]+)\](:(?P<port6>\d+))?|(?P<name>[^:]+)(:(?P<port>\d+))?", place)
    if not match:
        return place, None, user or None
    port = match["port6"] or match["port"]
    return match["v6"] or match["name"], int(port) if port else None, user or None


def _absolute(path: str, home: str) -> str:
    """A path on the device; relative ones and ``~/`` are meant from the home."""
    return path if path.startswith("/") else f"{home.rstrip('/')}/{path.removeprefix('~/')}".rstrip("/")


def _quote(word: str) -> str:
    """A word for the login shell, which may be sh, bash, zsh or fish: fish reads backslashes within '...'."""
    return '"\\\\"'.join(shlex.quote(part) if part else "" for part in word.split("\\")) or "''"


def _plain(error: DeviceError) -> DeviceError:
    """The error without control characters: much of its text comes from the device and goes to a terminal."""
    text = "".join(c if c.isprintable() else " " for c in str(error)[:ERROR_CHARS])
    return DeviceError(text, error.code if re.fullmatch(r"[a-z0-9-]{1,40}", error.code) else "device-error")


def _machine(header: bytes | None) -> tuple[bytes, bytes] | None:
    """Class, byte order and machine of an ELF file's header; None if it is no such file."""
    return (header[4:6], header[18:20]) if header and header.startswith(b"\x7fELF") else None


async def _pump(stream: asyncssh.SSHReader[bytes], take: Callable[[bytes], None] | None = None) -> None:
    """Give everything that comes to ``take`` (None: throw it away)."""
    while data := await stream.read(CHUNK_BYTES):
        if take:
            take(data)


async def _together(*work: Coroutine[Any, Any, None]) -> None:
    """Both to the end; the first exception ends the other and is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _faults(link: _Link | None, doing: str) -> Iterator[None]:
    """Whatever goes wrong within is raised as a ``DeviceError``."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:  # a device that breaks the protocol can raise anything in asyncssh
        raise _fault(link, doing, error) from error


LOST = (ConnectionError, asyncssh.DisconnectError, asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, EOFError)


def _fault(link: _Link | None, doing: str, error: Exception) -> DeviceError:
    cause = (link.watcher.error if link else None) or error
    if isinstance(error, TimeoutError) or "keepalive" in str(cause):
        if link:
            link.drop()
        text = f"the device stopped answering while {doing} ({cause or 'no answer'})"
        return DeviceError(f"{text}; see that it is on and the network holds, then try again", "link-dead")
    if isinstance(error, LOST) or (link and link.lost):
        if link:
            link.drop()
        return _BrokenError(f"the connection broke off while {doing} ({cause}); try again")
    if isinstance(error, asyncssh.SFTPNoSuchFile | asyncssh.SFTPNoSuchPath):
        return DeviceError(f"no such file on the device while {doing}: {error.reason}", "no-such-file")
    if isinstance(error, asyncssh.SFTPNoSpaceOnFilesystem | asyncssh.SFTPQuotaExceeded):
        return DeviceError(f"no space on the device while {doing}: {error.reason}; free some", "disk-full")
    if isinstance(error, asyncssh.SFTPPermissionDenied):
        text = f"the device's user may not do that ({doing}): {error.reason}"
        return DeviceError(f"{text}; set connect.folder to a place where it may write", "not-allowed")
    if isinstance(error, asyncssh.SFTPError):
        fix = "see that connect.folder can be written there, and its disk and quota"
        return DeviceError(f"the device refuses while {doing}: {error.reason or error}; {fix}", "device-refuses")
    if isinstance(error, asyncssh.ChannelOpenError):
        fix = "does its SSH server allow sessions and SFTP (Subsystem sftp, MaxSessions)?"
        return DeviceError(f"the device opens no session while {doing}: {error}; {fix}", "no-session")
    if isinstance(error, OSError):
        return DeviceError(f"on this machine, while {doing}: {error}", "local-file")
    return DeviceError(f"while {doing}: {type(error).__name__}: {error}", "ssh-failed")
