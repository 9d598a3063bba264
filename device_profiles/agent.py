"""The file that runs on the device, with that of a runtime beside it: Python >= 3.8, standard library, numpy and the
runtime, nothing of ours.

Reads one JSON request line on stdin, writes JSON lines on stdout; the last one is the answer. Protocol version 2:

    {"protocol": 2, "op": "probe"}
    {"protocol": 2, "op": "benchmark", "models": [{"name", "path", "sha256"}], "provider", "threads", "warmup",
     "min_repeats", "min_seconds", "max_seconds", "seed"; optional: "max_warmup_seconds" (0), "profile" (false),
     "energy" (false), "cpu_share" (of one core), "allow_busy" (false), "inputs" (.npz for all models; else seeded),
     "sustain_s" (0: each model is called for so many seconds without a pause, when all else is done)}
    {"protocol": 2, "op": "infer", "models": [one], "provider", "threads"; optional: "seed" (0), "inputs" (.npz),
     "each" (true: they hold samples for one call after another, shape (n, ...))}
    {"protocol": 2, "op": "sweep"; optional: "keep_s" (3600), "part_age_s" (600), "max_store_bytes" (4 GiB)}

Any request may have "timeout_s", "run_id", "work" (folder for files this call leaves), "python" (command that starts
the worker's Python), "parent_pid" (the client, where it runs on this machine), "runtime" (its name; onnxruntime) and
"runtime_file" (where that lies; ``runtimes/NAME.py`` beside this file).

A model may have "precision" (fp32): what its layers of floating point are to compute in.

A runtime is a file of functions. ``facts()`` imports it and gives its ``version`` and ``providers``;
``load(path, threads, provider)`` gives a session, of which ``inputs(session)`` tells names, shapes and number types,
``outputs(session)`` the names, and ``run(session, feeds)`` the arrays. Where it has them, ``provider(session)`` tells
which provider is really used, ``precision(session)`` what is really computed in (``fp32``, or several: ``fp32+int8``),
``profile(path, threads, provider, feeds, folder)`` times single nodes, and ``explain(error, name, version)`` puts its
exceptions into words. Where ``PRECISIONS`` names others than fp32, ``load`` takes one of them as ``precision``.

This process supervises; what is measured runs in a fresh worker process (``--worker``), a session of its own, which
the kernel kills when this process dies. **stdin is the dead-man switch**: its end means that the client is gone, and
the line ``{"cancel": true}`` ends the work too. The worker is killed and the work folder removed before anything is
printed. Events, ``{"event": "started" | "progress", ...}``, come before the answer.

Models are timed in turn, A B B A ..., so that whatever the machine does to one it does to the other. Every latency is
reported, wall and CPU time. An error is ``{"error": code, "detail": text}`` and an exit code of its own. What cannot
be read on this device is left out of the answer: absent, never zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Tuple

PROTOCOL = 2
EXIT_CODES = {
    "bad-request": 64,
    "sha256-mismatch": 65,
    "model-load": 66,
    "unknown-operator": 67,
    "runtime-crashes-on-import": 68,
    "missing-runtime": 69,
    "model-run": 70,
    "no-memory": 71,
    "worker-died": 72,
    "runtime-too-old": 73,
    "disk-full": 74,
    "busy": 75,  # EX_TEMPFAIL: try again later
    "device-error": 76,
    "not-allowed": 77,
    "timeout": 124,
    "wrong-arch": 126,
    "no-python": 127,
    "cancelled": 130,
}
SYSROOT = os.environ.get("EDGE_SYSROOT", "/")
WINDOW_S = 1.0  # of a sustained run
SAMPLE_S = 0.5  # between two readings of the sensors
HEARTBEAT_S = 5.0  # between two events that say that the work goes on
STEADY = 0.02  # relative change of the median from one window of calls to the next
STEADY_FLOOR_MS = 0.002  # smaller changes are the clock's
CPU_PERIOD_US = 10000
SLOWED = 0.95  # share of the highest clock below which a device counts as slowed down
CRASHES = (signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
DTYPES = ("float32", "float16", "float64", "uint8", "int8", "int32", "int64", "bool")
RUNTIME = "onnxruntime"
CPU = "CPUExecutionProvider"  # the word for the processor, whatever the runtime
FP32, INT8 = "fp32", "int8"
Request = Dict[str, Any]


class AgentError(Exception):
    """An error with a code of ``EXIT_CODES``."""

    def __init__(self, code: str, detail: str) -> None:
        Exception.__init__(self, detail)
        self.code = code


def main() -> int:
    try:
        control = Control()
        request = _read_request(control.first_line())
        if request.get("parent_pid") == os.getppid():
            _die_with_parent()
        reply = OPS[request["op"]](request, control)
    except (AgentError, OSError) as error:
        reply = _error_reply(error)
    emit(dict(reply, protocol=PROTOCOL))
    return EXIT_CODES[reply["error"]] if "error" in reply else 0


def _error_reply(error: Exception) -> Dict[str, Any]:
    known = _os_error(error) if isinstance(error, OSError) else error
    code = known.code if isinstance(known, AgentError) else "device-error"
    return {"error": code, "detail": str(known)}


def emit(line: Dict[str, Any]) -> None:
    """Write one JSON line on stdout; a client that reads no more is told nothing and stops nothing."""
    data = (json.dumps(line) + "\n").encode("ascii")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG = SIGKILL (prctl(2)): no orphan keeps the device busy."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 9)


def _os_error(error: OSError) -> AgentError:
    place = "%s: " % error.filename if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AgentError("disk-full", "%s%s; free some space or set connect.folder" % (place, error.strerror))
    if error.errno == errno.ENOMEM:
        return AgentError("no-memory", "%s%s; %s" % (place, error.strerror, MEMORY_FIX))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "let this user write there, or set connect.folder (SECATEUR_AGENT_STORE)"
        return AgentError("not-allowed", "%s%s; %s" % (place, error.strerror, fix))
    return AgentError("device-error", "%s%s" % (place, error))


MEMORY_FIX = "end other programs on the device, add swap, or measure fewer or smaller models at once"


# ---- requests and the line to the client ----


class Control:
    """What may end the work from outside: the client's lines on stdin, their end, and signals."""

    def __init__(self) -> None:
        self.lines = Lines()
        self.ended: Optional[str] = None
        self.wake, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the wake-up pipe tells

    def first_line(self) -> str:
        """The request.

        Raises:
            AgentError: ``bad-request``: stdin ended; ``cancelled``: a signal came.
        """
        while True:
            ready, _, _ = select.select([0, self.wake], [], [])
            if self.wake in ready:
                self._signalled()
            data = os.read(0, 65536)
            lines = self.lines.feed(data)
            if lines:
                for line in lines[1:]:
                    self._obey(line)
                return lines[0]
            if not data:
                return self.lines.rest.decode("utf-8", "replace")

    def wait(self, sources: List[int], timeout: float) -> List[int]:
        """Those of ``sources`` (file descriptors) that can be read, after at most ``timeout`` seconds.

        Raises:
            AgentError: ``cancelled``.
        """
        ready, _, _ = select.select([0, self.wake, *sources], [], [], max(0.0, timeout))
        if self.wake in ready:
            self._signalled()
        if 0 in ready:
            data = os.read(0, 65536)
            for line in self.lines.feed(data):
                self._obey(line)
            if not data:
                raise AgentError("cancelled", "the client is gone (stdin ended)")
        if self.ended:
            raise AgentError("cancelled", self.ended)
        return [source for source in ready if source not in (0, self.wake)]

    def _obey(self, line: str) -> None:
        value = parse_object(line)
        if value and value.get("cancel"):
            self.ended = "as the client asked"

    def _signalled(self) -> NoReturn:
        number = os.read(self.wake, 1)[0]
        raise AgentError("cancelled", "ended by %s" % signal.Signals(number).name)


class Lines:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> List[str]:
        parts = (self.rest + data).split(b"\n")
        self.rest = parts.pop()
        return [part.decode("utf-8", "replace") for part in parts]


def parse_object(line: str) -> Optional[Dict[str, Any]]:
    """A JSON object, or None for anything else: noise of a library or a login shell."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_request(line: str) -> Request:
    request = parse_object(line)
    if request is None:
        raise AgentError("bad-request", "the request is not one line of JSON: %r" % line[:80])
    if request.get("protocol") != PROTOCOL:
        raise AgentError("bad-request", "this agent speaks protocol %d" % PROTOCOL)
    op = request.get("op")
    if op not in OPS:
        raise AgentError("bad-request", "op must be one of %s, got %r" % (", ".join(sorted(OPS)), op))
    number = (int, float)
    kinds: Dict[str, Any] = {"models": list, "provider": str, "threads": int}
    if op == "benchmark":
        kinds.update(warmup=int, min_repeats=int, min_seconds=number, max_seconds=number, seed=int)
    optional: Dict[str, Any] = {
        "timeout_s": number, "run_id": str, "work": str, "python": list, "parent_pid": int, "seed": int,
        "max_warmup_seconds": number, "cpu_share": number, "inputs": str, "keep_s": number, "part_age_s": number,
        "max_store_bytes": number, "sustain_s": number, "profile": bool, "energy": bool, "each": bool,
        "allow_busy": bool, "runtime": str, "runtime_file": str,
    }  # fmt: skip
    wrong = [key for key, kind in optional.items() if request.get(key) is not None and not _is(request[key], kind)]
    if op in ("benchmark", "infer"):
        wrong += [key for key, kind in kinds.items() if not _is(request.get(key), kind)]
        wrong += _wrong_models(request) if "models" not in wrong else ["models[].name/path/sha256"]
        if "threads" not in wrong and request["threads"] < 1:
            wrong.append("threads >= 1")
    if "cpu_share" not in wrong and not 0 < (request.get("cpu_share") or 1) <= (os.cpu_count() or 1):
        wrong.append("cpu_share between 0 and the number of cores")
    if wrong:
        raise AgentError("bad-request", "missing or of the wrong type: " + ", ".join(wrong))
    return {key: value for key, value in request.items() if value is not None}


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _wrong_models(request: Request) -> List[str]:
    models = request["models"]
    if not models or not all(isinstance(m, dict) and {"name", "path", "sha256"} <= set(m) for m in models):
        return ["models[].name/path/sha256"]
    if len({m["name"] for m in models}) < len(models):
        return ["models[].name (each once)"]
    if not all(isinstance(m.get("precision", ""), str) for m in models):
        return ["models[].precision"]
    return ["models (infer takes one)"] if request["op"] == "infer" and len(models) > 1 else []


# ---- what is asked for ----


def probe(request: Request, control: Control) -> Dict[str, Any]:
    """What this device is, has and allows; the runtime is imported in a process of its own, which it may crash."""
    before, started = _pressure(), time.monotonic()
    with Monitor() as monitor:
        runtime = supervise(request, "import", control, monitor)
    now = read_sensors([0])
    fastest = _read_int("sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if fastest is not None:
        now["freq_hardware_max_mhz"] = fastest / 1000
    if before is not None and "cpu_pressure_us" in now:
        elapsed_us = max((time.monotonic() - started) * 1e6, 1.0)
        now["cpu_pressure"] = (now["cpu_pressure_us"] - before) / elapsed_us
    told = {"device": describe_device(), "runtime": runtime, "limits": describe_limits(), "now": now}
    return dict(told, host=platform.node())  # for whoever looks whether it is the right machine; kept nowhere


def benchmark(request: Request, control: Control) -> Dict[str, Any]:
    """Time models in turn; see ``measure_models`` for what the worker does."""
    with contextlib.ExitStack() as stack:
        lock = take_lock(request)
        if lock is not None:
            stack.callback(os.close, lock)
        job = dict(request)
        if request.get("profile") or "work" in request:
            work = stack.enter_context(WorkFolder(request))
            job["work"] = work.path
        cgroup = None
        if "cpu_share" in request:
            cgroup = stack.enter_context(CpuShare(request["cpu_share"]))
            job["cgroup"] = cgroup.path
        job["cores"] = pick_cores(request["threads"])
        monitor = stack.enter_context(Monitor(job["cores"], cgroup.path if cgroup else None))
        environment = describe_device()
        answer = supervise(job, "benchmark", control, monitor)
        environment.update(answer["environment"])
        environment.update(monitor.facts())
        answer["environment"] = environment
    return answer


def infer(request: Request, control: Control) -> Dict[str, Any]:
    """Run a model once; the outputs are left in a file."""
    with contextlib.ExitStack() as stack:
        lock = take_lock(request)
        if lock is not None:
            stack.callback(os.close, lock)
        work = stack.enter_context(WorkFolder(request))
        job = dict(request, work=work.path, cores=pick_cores(request["threads"]))
        answer = supervise(job, "infer", control, stack.enter_context(Monitor()))
        work.keep()
    return dict(answer, work=work.path)


def sweep(request: Request, control: Control) -> Dict[str, Any]:
    """Remove what dead sessions left, and the models that were used longest ago if the store is too large."""
    removed = _sweep_work(float(request.get("keep_s", 3600)))
    removed += _sweep_parts(float(request.get("part_age_s", 600)))
    sweep_cgroups()
    models, kept = _sweep_models(request)
    return {"removed": removed + models, "kept_bytes": kept}


OPS: Dict[str, Callable[[Request, Control], Dict[str, Any]]] = {
    "probe": probe,
    "benchmark": benchmark,
    "infer": infer,
    "sweep": sweep,
}


def take_lock(request: Request) -> Optional[int]:
    """Lock this device, or fail at once; the kernel lets go when the process dies, so no lock is ever stale.

    Returns the lock's file descriptor, or None where the request allows a busy device and it is busy.

    Raises:
        AgentError: ``busy``: another process measures here; names it.
        OSError: the file system has no locks.
    """
    lock = _open_lock()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        holder = _holder(lock)
        os.close(lock)
        if request.get("allow_busy"):
            return None
        who = "pid %s" % holder.get("pid", "unknown") + (", run %s" % holder["run_id"] if "run_id" in holder else "")
        detail = "the device is measuring for another process; holder %s" % who
        raise AgentError("busy", detail) from None
    with contextlib.suppress(OSError):
        run = re.sub(r"\s+", " ", request.get("run_id", ""))[:80]
        os.ftruncate(lock, 0)
        os.pwrite(lock, ("%d %s\n" % (os.getpid(), run)).encode("utf-8", "replace"), 0)
    return lock


def lock_folder() -> str:
    """Where the locks of this machine are: one folder for all users and homes, and for containers that mount it.

    It follows from what the folders are, never from who asks, nor from TMPDIR: whoever measures must meet at one lock.
    ``SECATEUR_LOCKS`` names another one.
    """
    given = os.environ.get("SECATEUR_LOCKS")
    if given:
        return given
    with contextlib.suppress(OSError):
        open_to_all = os.stat("/run/lock").st_mode & 0o1002 == 0o1002  # every user may make files there, as in /tmp
        if open_to_all and not os.statvfs("/run/lock").f_flag & os.ST_RDONLY:  # as in a container's read-only root
            return "/run/lock"
    return "/tmp"  # noqa: S108  the one folder that every user has


def open_lock(path: str) -> int:
    """The file of a lock, which every user can lock; made where there is none. No link is followed.

    Raises:
        OSError: it cannot be made or opened, or is no ordinary file.
    """
    with contextlib.suppress(FileExistsError):
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(lock, 0o666)  # whatever the umask: other users measure on this device too
        return lock
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        lock = os.open(path, os.O_RDWR | flags)
    except PermissionError:  # another user's file: flock needs no write permission
        lock = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise OSError(errno.EINVAL, "a lock must be an ordinary file; remove it", path)
    return lock


def _open_lock() -> int:
    return open_lock(os.path.join(lock_folder(), "secateur-device.lock"))


def _holder(lock: int) -> Dict[str, Any]:
    """Who wrote the lock file: ``pid`` and ``run_id``."""
    pid, _, run = os.pread(lock, 512, 0).decode("utf-8", "replace").strip().partition(" ")
    facts: Dict[str, Any] = {"pid": int(pid)} if pid.isdigit() else {}
    if run:
        facts["run_id"] = run
    return facts


# ---- the store and work folders ----


def store_path() -> str:
    return os.environ.get("SECATEUR_AGENT_STORE") or os.path.join(os.path.expanduser("~"), ".cache", "secateur")


class WorkFolder:
    """A folder for the files of one call, removed at its end unless ``keep`` was called.

    A locked file ``.alive`` in it tells a sweep that the call goes on. A folder that the client names is removed only
    if it lies directly in the store's ``work`` folder; elsewhere only this call's own files are.
    """

    FILES = ("outputs.npz", "outputs.npz.part", ".alive")

    def __init__(self, request: Request) -> None:
        home = os.path.join(store_path(), "work")
        if "work" in request:
            self.path = os.path.abspath(request["work"])
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        else:
            os.makedirs(home, mode=0o700, exist_ok=True)
            self.path = tempfile.mkdtemp(prefix="run-", dir=home)
        self.ours = os.path.dirname(os.path.realpath(self.path)) == os.path.realpath(home)
        self.kept = False
        mine = os.path.join(self.path, ".alive.%d" % os.getpid())
        self.lock = os.open(mine, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        os.rename(mine, os.path.join(self.path, ".alive"))  # so it is never seen unlocked

    def __enter__(self) -> WorkFolder:
        return self

    def keep(self) -> None:
        """Leave the folder for the client to fetch from; a later sweep removes it."""
        self.kept = True

    def __exit__(self, *_: object) -> None:
        if self.ours and not self.kept:
            shutil.rmtree(self.path, ignore_errors=True)
        for name in (".alive",) if self.kept else self.FILES:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.path, name))
        for trace in glob.glob(os.path.join(glob.escape(self.path), "trace-*.json")):
            with contextlib.suppress(OSError):
                os.unlink(trace)
        os.close(self.lock)


def _sweep_work(keep_s: float) -> List[str]:
    """Remove folders whose agent died, and those that nobody has touched for ``keep_s`` seconds."""
    removed = []
    for folder in _entries(os.path.join(store_path(), "work")):
        alive = os.path.join(folder, ".alive")
        if not _locked(alive) if os.path.exists(alive) else _age(folder) > keep_s:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _sweep_parts(age_s: float) -> List[str]:
    """Remove uploads that were broken off: ``.part`` files which have not grown for ``age_s`` seconds."""
    removed = []
    for folder in (store_path(), os.path.join(store_path(), "models")):
        for path in _entries(folder):
            if path.endswith(".part") and os.path.isfile(path) and _age(path) > age_s:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed.append(path)
    return removed


def _sweep_models(request: Request) -> Tuple[List[str], int]:
    """Paths removed, and bytes of models left; none goes while another process measures."""
    limit = request.get("max_store_bytes", 4 << 30)
    models = []
    for path in _entries(os.path.join(store_path(), "models")):
        with contextlib.suppress(OSError):
            facts = os.stat(path)
            if not path.endswith(".part"):
                models.append((max(facts.st_atime, facts.st_mtime), path, facts.st_size))
    left = sum(size for _, _, size in models)
    removed: List[str] = []
    if left > limit and not _lock_state()["held"]:
        for _, path, size in sorted(models):
            if left <= limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                removed.append(path)
                left -= size
    return removed, left


def _entries(folder: str) -> List[str]:
    try:
        return sorted(os.path.join(folder, name) for name in os.listdir(folder))
    except OSError:
        return []


def _age(path: str) -> float:
    """Seconds since the newest change of a file, or of a folder and the files in it."""
    newest = 0.0
    for entry in [path, *_entries(path)]:
        with contextlib.suppress(OSError):
            newest = max(newest, os.stat(entry).st_mtime)
    return time.time() - newest


def _locked(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


# ---- the supervisor ----


def supervise(job: Request, op: str, control: Control, monitor: Monitor) -> Dict[str, Any]:
    """Run ``op`` in a worker process and return its answer; the worker and all it started are gone afterwards.

    Raises:
        AgentError: the worker's own error, ``worker-died``, ``runtime-crashes-on-import``, ``timeout``, ``cancelled``,
            ``no-python`` or ``wrong-arch``.
    """
    end = time.monotonic() + job["timeout_s"] if "timeout_s" in job else float("inf")
    worker = Worker(job, op)
    try:
        emit({"event": "started", "pid": os.getpid(), "worker_pid": worker.process.pid})
        _leave_cores(job.get("cores"))
        while worker.reply is None:
            now = time.monotonic()
            if now >= end:
                fix = "lower the tier's min_repeats or raise the time-out"
                raise AgentError("timeout", "no result within %g s (%s); %s" % (job["timeout_s"], worker.phase, fix))
            pause = min(monitor.tick(worker.phase), end - now)
            for event in worker.take(control.wait(worker.sources(), pause)):
                monitor.tick(worker.phase, due=True)
                emit(event)
            if worker.reply is None and not worker.sources():
                raise worker.death(monitor)
    finally:
        worker.end()
    if "error" in worker.reply:
        raise AgentError(worker.reply["error"], worker.reply["detail"])
    return worker.reply


class Worker:
    """The process that does the measured work, seen from the supervisor."""

    def __init__(self, job: Request, op: str) -> None:
        command = [str(part) for part in job.get("python") or [sys.executable]]
        environment = dict(os.environ)
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only take memory
        try:
            self.process = subprocess.Popen(
                [*command, os.path.abspath(__file__), "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=environment,
            )
        except OSError as error:
            code = "wrong-arch" if error.errno == errno.ENOEXEC else "no-python"
            detail = "cannot start %s: %s; set connect.python" % (command[0], error.strerror)
            raise AgentError(code, detail) from error
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.out, self.err = self.process.stdout.fileno(), self.process.stderr.fileno()
        self.open = [self.out, self.err]
        self.lines = Lines()
        self.errors = b""
        self.phase = "start"
        self.runtime = job.get("runtime", RUNTIME)
        self.reply: Optional[Dict[str, Any]] = None
        with contextlib.suppress(OSError):  # its death shows when we read
            self.process.stdin.write((json.dumps(dict(job, op=op)) + "\n").encode("ascii"))
            self.process.stdin.flush()

    def sources(self) -> List[int]:
        """File descriptors that may still bring something; none when the worker has ended."""
        return self.open

    def take(self, ready: List[int]) -> Iterator[Dict[str, Any]]:
        """Read what is there; yields the events in it."""
        for source in ready:
            data = os.read(source, 65536)
            if not data:
                self.open = [other for other in self.open if other != source]
            elif source == self.err:
                self.errors = (self.errors + data)[-20000:]
            else:
                for line in self.lines.feed(data):
                    value = parse_object(line) or {}
                    if value.get("event"):
                        self.phase = value.get("text", self.phase)
                        yield value
                    elif "reply" in value:
                        self.reply = value["reply"]

    def death(self, monitor: Monitor) -> AgentError:
        """Why a worker that left no answer is gone."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return AgentError("worker-died", "the worker closed its output during %s" % self.phase)
        text = self.errors.decode("utf-8", "replace").strip()
        said = ": " + " | ".join(text.splitlines()[-3:]) if text else ""
        number = -code if code < 0 else code - 128  # a shell around it says 128 + signal
        if number in CRASHES and self.phase in ("start", "import"):
            fix = "it was built for another CPU or system; install the build for this %s" % platform.machine()
            detail = "importing %s ended with %s; %s%s" % (self.runtime, signal.Signals(number).name, fix, said)
            return AgentError("runtime-crashes-on-import", detail)
        if self.phase == "start" and code in (126, 127):
            return AgentError("no-python" if code == 127 else "wrong-arch", "set connect.python%s" % said)
        if number == signal.SIGKILL:
            return AgentError("worker-died", "killed by SIGKILL during %s; %s" % (self.phase, monitor.killer()))
        cause = "exit code %d" % code
        with contextlib.suppress(ValueError):
            cause = signal.Signals(number).name
        return AgentError("worker-died", "%s during %s%s" % (cause, self.phase, said or "; nothing on stderr"))

    def end(self) -> None:
        """Kill the worker's process group and wait."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def pick_cores(threads: int) -> List[int]:
    """As many of the allowed cores as threads, the fastest ones first; empty where they cannot be read."""
    try:
        allowed = os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return []
    speed = {core: _read_int("sys/devices/system/cpu/cpu%d/cpufreq/cpuinfo_max_freq" % core) or 0 for core in allowed}
    return sorted(sorted(allowed, key=lambda core: (-speed[core], -core))[:threads])


def _leave_cores(cores: Optional[List[int]]) -> None:
    """The supervisor keeps off the measured cores, if there are others."""
    with contextlib.suppress(AttributeError, OSError):
        others = os.sched_getaffinity(0) - set(cores or ())
        if cores and others:
            os.sched_setaffinity(0, others)


class Monitor:
    """Reads the sensors before, during and after the work, twice a second.

    Args:
        cores: the measured cores; the slowest one's clock counts.
        cgroup: folder of the cgroup that limits the work; None = the one we are in.
    """

    def __init__(self, cores: Optional[List[int]] = None, cgroup: Optional[str] = None) -> None:
        self.cores = cores or [0]
        folders = [cgroup] if cgroup else cgroup_folders()
        self.throttle_files = [os.path.join(folder, "cpu.stat") for folder in folders]
        self.samples: List[Dict[str, Any]] = []
        self.wall, self.begin = time.time(), time.monotonic()
        self.phase, self.next, self.beat = "start", self.begin, self.begin + HEARTBEAT_S
        self.kills = self._oom_kills()
        self.counters = self._counters()
        self.least_memory: Optional[int] = None
        self.old_bits: Optional[int] = None

    def __enter__(self) -> Monitor:
        self.tick("before", due=True)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tick(self, phase: str, due: bool = False) -> float:
        """Take a sample if one is due; returns the seconds until the next."""
        now = time.monotonic()
        if due or now >= self.next:
            self.samples.append(self._sample(now, phase))
            self.next = now + SAMPLE_S
        if now >= self.beat:
            self.beat = now + HEARTBEAT_S
            emit({"event": "progress", "text": phase, "elapsed_s": round(now - self.begin, 1)})
        return self.next - time.monotonic()

    def facts(self) -> Dict[str, Any]:
        """What the samples say, for the answer's ``environment``."""
        after = self._counters()
        self.tick("end", due=True)
        facts: Dict[str, Any] = {"telemetry": self.samples, "clock_jump_s": self._clock_jump()}
        heat = [sample["temperature_c"] for sample in self.samples if "temperature_c" in sample]
        if heat:
            facts["temperature_c"] = {"start": heat[0], "max": max(heat), "end": heat[-1]}
        if "nr_throttled" in after and "nr_throttled" in self.counters:
            facts["nr_throttled"] = after["nr_throttled"] - self.counters["nr_throttled"]
        throttled = was_throttled(self.samples)
        if throttled is not None:
            facts["throttled"] = throttled
        return facts

    def killer(self) -> str:
        """The likely cause of a SIGKILL."""
        kills = self._oom_kills()
        if kills is not None and self.kills is not None and kills > self.kills:
            return "the kernel ran out of memory and killed a process; " + MEMORY_FIX
        total = memory("MemTotal")
        least = min((m for m in (self.least_memory, memory("MemAvailable")) if m is not None), default=None)
        if total and least is not None and least < max(0.05 * total, 32 << 20):
            return "memory was short (%d MB left), so probably for lack of it; %s" % (least >> 20, MEMORY_FIX)
        return "by somebody or by a limit on its memory (see dmesg); try again"

    def _sample(self, now: float, phase: str) -> Dict[str, Any]:
        sample: Dict[str, Any] = {"t_s": round(now - self.begin, 3), "phase": phase}
        sample.update(read_sensors(self.cores), **self._counters())
        if "throttled" in sample:  # what happened before we came does not count
            self.old_bits = sample["throttled"] if self.old_bits is None else self.old_bits
            sample["throttled"] &= 0xF | (0xF0000 & ~self.old_bits)
        left = memory("MemAvailable")
        if left is not None:
            self.least_memory = min(left, self.least_memory or left)
        return sample

    def _counters(self) -> Dict[str, Any]:
        counters: Dict[str, Any] = {}
        for path in self.throttle_files:
            for line in (_read(path) or "").splitlines():
                if line.startswith("nr_throttled ") and "nr_throttled" not in counters:
                    counters["nr_throttled"] = int(line.split()[1])
        return counters

    def _clock_jump(self) -> float:
        """Seconds that the wall clock was set forwards meanwhile."""
        return round((time.time() - self.wall) - (time.monotonic() - self.begin), 3)

    def _oom_kills(self) -> Optional[int]:
        match = re.search(r"^oom_kill (\d+)$", _read("proc/vmstat") or "", re.MULTILINE)
        return int(match.group(1)) if match else None


def read_sensors(cores: List[int]) -> Dict[str, Any]:
    """Temperature (degrees Celsius), clock (MHz, of the slowest core), governor, throttling and load, if readable."""
    clocks = [_read_int("sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq" % core) for core in cores]
    known = [clock for clock in clocks if clock is not None]
    readings: Dict[str, Any] = {
        "temperature_c": _temperature(),
        "freq_mhz": min(known) / 1000 if known else None,
        "governor": _read("sys/devices/system/cpu/cpu%d/cpufreq/scaling_governor" % cores[0]),
        "cooling": _cooling(),
        "throttled": _pi_throttled(),
        "cpu_pressure_us": _pressure(),
        "loadavg": _loadavg(),
    }
    return {key: value for key, value in readings.items() if value is not None}


def _cooling() -> Optional[int]:
    """The highest state of the cooling devices that slow a CPU down; 0 = none does."""
    states = []
    for folder in glob.glob(os.path.join(glob.escape(SYSROOT), "sys/class/thermal/cooling_device*")):
        kind = (_read(os.path.join(folder, "type")) or "").lower()
        state = _read_int(os.path.join(folder, "cur_state"))
        if state is not None and ("cpu" in kind or "processor" in kind or "powerclamp" in kind):
            states.append(max(state, 0))  # powerclamp says -1 when it is off
    return max(states, default=None)


def _pi_throttled() -> Optional[int]:
    """The Raspberry Pi firmware's bits: 0-3 under-voltage, capped, throttled, hot; 16-19 the same since the start."""
    for path in glob.glob(os.path.join(glob.escape(SYSROOT), "sys/devices/platform/soc*/soc*:firmware/get_throttled")):
        with contextlib.suppress(ValueError):
            return int(_read(path) or "", 16)
    return None


def _pressure() -> Optional[int]:
    """Microseconds in which some process waited for a CPU, since the start of the machine."""
    for line in (_read("proc/pressure/cpu") or "").splitlines():
        if line.startswith("some") and "total=" in line:
            return int(line.rsplit("total=", 1)[1])
    return None


def _loadavg() -> Optional[float]:
    try:
        return float((_read("proc/loadavg") or "").split()[0])
    except (IndexError, ValueError):
        return None


def was_throttled(samples: List[Dict[str, Any]]) -> Optional[bool]:
    """Whether heat or voltage slowed the device down meanwhile; None where no sensor tells.

    Signs: a Raspberry Pi's bits that are set now or were set meanwhile, a cooling device at work, or a clock that was
    below 95 % of its highest value in more than a quarter of the samples taken while timing.
    """
    bits = [sample["throttled"] for sample in samples if "throttled" in sample]
    cooling = [sample["cooling"] for sample in samples if "cooling" in sample]
    timing = [i for i, sample in enumerate(samples) if sample.get("phase") == "timing"]
    timed = samples[timing[0] : timing[-1] + 2] if timing else []  # and the one at its end
    clocks = [sample["freq_mhz"] for sample in timed if "freq_mhz" in sample]
    if not bits and not cooling and not clocks:
        return None
    slow = sum(clock < SLOWED * max(clocks) for clock in clocks)
    return any(bits) or any(cooling) or slow > len(clocks) / 4


def memory(key: str) -> Optional[int]:
    """A line of /proc/meminfo in bytes."""
    match = re.search(r"^%s:\s+(\d+) kB" % key, _read("proc/meminfo") or "", re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


# ---- a share of a core ----


def cgroup_folders() -> List[str]:
    """The cgroups we are in that may have a cpu controller (v1 first), and those above them, nearest first."""
    mounts: Dict[str, str] = {}
    for line in (_read("proc/mounts") or "").splitlines():
        _, place, kind, options = (line.split(" ") + [""] * 4)[:4]
        if kind == "cgroup" and "cpu" in options.split(","):
            mounts["v1"] = place.replace("\\040", " ")
        elif kind == "cgroup2":
            mounts["v2"] = place.replace("\\040", " ")
    folders: List[str] = []
    for line in (_read("proc/self/cgroup") or "").splitlines():
        _, controllers, path = (line.split(":", 2) + [""] * 3)[:3]
        version = "v1" if "cpu" in controllers.split(",") else "v2" if not controllers else ""
        if version in mounts:
            chain = _upwards(os.path.join(SYSROOT, mounts[version].lstrip("/")), path)
            folders = chain + folders if version == "v1" else folders + chain
    return folders


def _upwards(root: str, path: str) -> List[str]:
    """The folders from ``root/path`` up to ``root`` that exist; in a container the path may mean nothing."""
    parts = [part for part in path.split("/") if part]
    tries = [os.path.join(root, *parts[:n]) for n in range(len(parts), -1, -1)]
    return [folder for folder in tries if os.path.isdir(folder)]


class CpuShare:
    """A cgroup that gives its processes a share of one core's time, in periods of 10 ms; removed at the end."""

    def __init__(self, share: float) -> None:
        sweep_cgroups()
        self.quota = max(1000, round(share * CPU_PERIOD_US))  # the kernel grants no less than 1 ms
        self.period = round(self.quota / share)
        refusals = []
        for base in cgroup_folders():
            self.path = os.path.join(base, "secateur-%d" % os.getpid())
            try:
                self._make(base)
                return
            except OSError as error:
                refusals.append("%s: %s" % (error.filename or base, error.strerror))
                with contextlib.suppress(OSError):
                    os.rmdir(self.path)
        fix = "run the agent as root or under `systemd-run --user --scope -p Delegate=yes`, or leave cpu_share out"
        tried = "; ".join(refusals) or "no cgroup with a cpu controller is mounted"
        raise AgentError("not-allowed", "cpu_share needs a cgroup it can write to (%s); %s" % (tried, fix))

    def _make(self, base: str) -> None:
        version1 = os.path.exists(os.path.join(base, "cpu.cfs_quota_us"))
        if not version1 and "cpu" not in (_read(os.path.join(base, "cgroup.subtree_control")) or "").split():
            _write(os.path.join(base, "cgroup.subtree_control"), "+cpu")
        os.mkdir(self.path)
        if version1:
            _write(os.path.join(self.path, "cpu.cfs_period_us"), str(self.period))
            _write(os.path.join(self.path, "cpu.cfs_quota_us"), str(self.quota))
        else:
            _write(os.path.join(self.path, "cpu.max"), "%d %d" % (self.quota, self.period))

    def __enter__(self) -> CpuShare:
        return self

    def __exit__(self, *_: object) -> None:
        for _attempt in range(100):  # the kernel needs a moment after the last process died
            try:
                os.rmdir(self.path)
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)


def sweep_cgroups() -> None:
    """Remove cgroups of dead agents; the kernel refuses for those in use."""
    for base in cgroup_folders():
        for folder in glob.glob(os.path.join(glob.escape(base), "secateur-*")):
            pid = folder.rpartition("-")[2]
            if pid.isdigit() and not os.path.exists("/proc/" + pid):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# ---- the worker ----


def worker_main() -> int:
    """Do one job, written as one JSON line on stdin; the answer is ``{"reply": {...}}`` on stdout."""
    _die_with_parent()
    with contextlib.suppress(OSError):
        _write("/proc/self/oom_score_adj", "500")  # if memory runs out, the supervisor lives to tell
    job = parse_object(sys.stdin.buffer.readline().decode("utf-8", "replace"))
    if job is None:
        return 1  # the supervisor died first
    threading.Thread(target=_die_with_stdin, daemon=True).start()
    try:
        if "cgroup" in job:
            _write(os.path.join(job["cgroup"], "cgroup.procs"), str(os.getpid()))
        reply = JOBS[job["op"]](job)
    except (AgentError, OSError) as error:
        reply = _error_reply(error)
    except MemoryError:
        reply = {"error": "no-memory", "detail": "the worker ran out of memory; " + MEMORY_FIX}
    emit({"reply": reply})
    return 0


def _die_with_stdin() -> None:
    """A second string to the kernel's signal, which an emulator or a wrapper script may keep from us."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


def _phase(text: str) -> None:
    emit({"event": "progress", "text": text})


def import_only(job: Request) -> Dict[str, Any]:
    """Versions and providers of the runtime."""
    runtime, import_ms = _import_runtime(job)
    return dict(runtime.described(), import_ms=import_ms)


def measure_models(job: Request) -> Dict[str, Any]:
    """Load all models, warm up, then time them in turn; energy and single nodes afterwards, each model alone."""
    started = time.time()
    _phase("check")
    for model in job["models"]:
        _verify(model)
    pinned = _pin(job.get("cores"))
    runtime, import_ms = _import_runtime(job)
    base_rss = _status_bytes("VmRSS")
    _phase("load")
    runners = [Runner(runtime, model, job) for model in job["models"]]
    _phase("warm-up")
    warm_ups = warm_up(runners, job)
    _phase("timing")
    before = _load_signals()
    gc.disable()
    wall, cpu = _interleave(runners, job)
    gc.enable()
    environment = runtime.described()
    environment.update(_load_during(before, _load_signals()))
    environment.update(provider=runners[0].provider, threads=job["threads"])
    if pinned:
        environment["cores"] = pinned
    models = {}
    for i, runner in enumerate(runners):
        facts = dict(runner.facts, **warm_ups[i], wall_ms=wall[i], cpu_ms=cpu[i], import_ms=import_ms)
        if base_rss and "peak_rss_bytes" in facts:
            facts["peak_rss_bytes"] += base_rss
        models[runner.name] = facts
    _measure_energy(runners, job, models)
    _profile_nodes(runtime, runners, job, models)
    if job.get("sustain_s", 0) > 0:
        for runner in runners:
            _phase("sustained")
            models[runner.name]["sustained"] = sustain(runner.call, job["sustain_s"])
    _phase("done")
    answer = {"models": models, "environment": environment, "started": started, "ended": time.time()}
    if base_rss:
        answer["runtime_rss_bytes"] = base_rss
    return answer


def run_once(job: Request) -> Dict[str, Any]:
    """Run one model on its seeded or given inputs and write the outputs to ``outputs.npz`` in the work folder."""
    model = job["models"][0]
    _verify(model)
    _pin(job.get("cores"))
    runtime, _ = _import_runtime(job)
    _phase("load")
    runner = Runner(runtime, model, dict(job, seed=job.get("seed", 0)), warm=False)
    _phase("infer")
    outputs = runner.each_call() if job.get("each") else runner.first_call()
    path = os.path.join(job["work"], "outputs.npz")
    named = {name: outputs[i] for i, name in enumerate(runtime.module.outputs(runner.session))}
    sha256 = _write_npz(path, named)
    return {"outputs": path, "output_sha256": runner.facts["output_sha256"], "sha256": sha256}


JOBS: Dict[str, Callable[[Request], Dict[str, Any]]] = {
    "import": import_only,
    "benchmark": measure_models,
    "infer": run_once,
}


def warm_up(runners: List[Runner], job: Request) -> List[Dict[str, Any]]:
    """Call the models in turn until they are steady; returns ``warmup_calls`` and ``steady`` of each model."""
    on_cpu = job["threads"] == 1 and job["provider"] == CPU
    clock = time.process_time_ns if on_cpu else time.perf_counter_ns
    times: List[List[float]] = [[] for _ in runners]
    end = time.monotonic() + job.get("max_warmup_seconds", 0)
    while True:
        if len(times[0]) >= job["warmup"]:
            steady = [is_steady(calls) for calls in times]
            if all(steady) or time.monotonic() >= end:
                return [{"warmup_calls": len(times[0]), "steady": still} for still in steady]
        for i, runner in enumerate(runners):
            begin = clock()
            runner.call()
            times[i].append((clock() - begin) / 1e6)


def is_steady(calls: List[float]) -> bool:
    """Whether the medians of the last two windows of calls (ms) differ by less than 2 %."""
    window = min(50, max(4, len(calls) // 3))
    if len(calls) < 2 * window:
        return False
    earlier = statistics.median(calls[-2 * window : -window])
    later = statistics.median(calls[-window:])
    return abs(later - earlier) <= max(STEADY * earlier, STEADY_FLOOR_MS)


def _interleave(runners: List[Runner], request: Request) -> Tuple[List[List[float]], List[List[float]]]:
    """Milliseconds per model and iteration: wall and CPU.

    Every second round runs backwards: what a model leaves in the caches falls on all others alike.
    """
    order = list(range(len(runners)))
    wall: List[List[float]] = [[] for _ in runners]
    cpu: List[List[float]] = [[] for _ in runners]
    begin = time.perf_counter()
    repeats = 0
    while True:
        for i in order:
            w0 = time.perf_counter_ns()
            c0 = time.process_time_ns()
            runners[i].call()
            c1 = time.process_time_ns()
            w1 = time.perf_counter_ns()
            wall[i].append((w1 - w0) / 1e6)
            cpu[i].append((c1 - c0) / 1e6)
        repeats += 1
        order.reverse()
        elapsed = time.perf_counter() - begin
        enough = repeats >= request["min_repeats"] and elapsed >= request["min_seconds"]
        if enough or (elapsed >= request["max_seconds"] and repeats >= 3):
            return wall, cpu


class Runner:
    """One model, loaded, with its input; called once unless ``warm`` is False."""

    def __init__(self, runtime: Runtime, model: Dict[str, str], request: Request, warm: bool = True) -> None:
        self.name, self.path = model["name"], model["path"]
        self.runtime, self.run = runtime, runtime.module.run
        self.facts: Dict[str, Any] = {}
        runtime.require(request["provider"])
        rss = _reset_peak()
        t0 = time.perf_counter_ns()
        try:
            self.session = runtime.load(model, request["threads"], request["provider"])
            t1 = time.perf_counter_ns()
            inputs = runtime.module.inputs(self.session)
            self.feed = {name: _random_input(name, shape, kind, request["seed"]) for name, shape, kind in inputs}
            if "inputs" in request:
                self.feed = _given_inputs(request["inputs"], self)
        except AgentError:
            raise
        except Exception as error:  # a runtime's own exceptions share no base class
            raise runtime.error("model-load", self.name, error) from error
        self.provider = runtime.provider(self.session)
        if self.provider != request["provider"]:
            detail = "%s runs on %s, not on %s" % (self.name, self.provider, request["provider"])
            raise AgentError("model-load", detail)
        self.facts.update(runtime.precision(self.session, model), load_ms=(t1 - t0) / 1e6)
        if warm:
            self.first_call()
        peak = _status_bytes("VmHWM")
        if peak and rss:
            self.facts["peak_rss_bytes"] = peak - rss  # the caller adds what the runtime itself takes

    def first_call(self) -> List[Any]:
        """Call, time and digest; returns the outputs."""
        begin = time.perf_counter_ns()
        try:
            outputs = self.call()
        except Exception as error:
            raise self.runtime.error("model-run", self.name, error) from error
        self.facts["first_ms"] = (time.perf_counter_ns() - begin) / 1e6
        digest = hashlib.sha256()
        for output in outputs:
            digest.update(output.tobytes() if hasattr(output, "tobytes") else repr(output).encode())
        self.facts["output_sha256"] = digest.hexdigest()
        return outputs

    def each_call(self) -> List[Any]:
        """Call with one sample of the inputs after another; returns the outputs of all."""
        import numpy as np

        whole, found = self.feed, []
        for i in range(min(len(values) for values in whole.values())):
            self.feed = {name: np.ascontiguousarray(values[i : i + 1]) for name, values in whole.items()}
            found.append(self.first_call())
        return [np.concatenate(column) for column in zip(*found)]  # noqa: B905 - Python 3.8

    def call(self) -> List[Any]:
        return self.run(self.session, self.feed)  # type: ignore[no-any-return]


def _random_input(name: str, shape: List[Any], dtype: str, seed: int) -> Any:
    """Standard normal (or small integers) of the model's own shape; a dynamic dimension is 1."""
    import numpy as np

    shape = [d if isinstance(d, int) and d > 0 else 1 for d in shape]
    if dtype not in DTYPES:
        raise AgentError("model-load", "input %s is a %s; known: %s" % (name, dtype, ", ".join(DTYPES)))
    rng = np.random.default_rng([seed, *shape])
    kind = np.dtype(dtype)
    values = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
    return np.ascontiguousarray(values.astype(kind))


def _given_inputs(path: str, runner: Runner) -> Dict[str, Any]:
    import numpy as np

    wanted = list(runner.feed)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.ascontiguousarray(file[name]) for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise AgentError("bad-request", "%s is no .npz of arrays: %s" % (path, error)) from error
    except FileNotFoundError as error:
        raise AgentError("bad-request", "no inputs at %s; bring them first" % path) from error
    if set(arrays) != set(wanted):
        detail = "%s holds %s; the inputs of %s are %s"
        raise AgentError("bad-request", detail % (path, ", ".join(arrays) or "nothing", runner.name, ", ".join(wanted)))
    return arrays


def _write_npz(path: str, arrays: Dict[str, Any]) -> str:
    """Write arrays as numpy does, whole or not at all (whatever their names); returns the file's sha256."""
    import numpy as np

    with zipfile.ZipFile(path + ".part", "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise AgentError("model-run", "output %s is no tensor; only tensors can be fetched" % name)
            with archive.open(name + ".npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    digest = _sha256(path + ".part")
    os.replace(path + ".part", path)
    return digest


def sustain(call: Callable[[], Any], seconds: float) -> List[Dict[str, Any]]:
    """Call without a pause for so many seconds; of each its beginning (``t_s``), ``calls``, ``p50_ms`` and ``p95_ms``.

    One call that takes longer than a second stands for all that it takes.
    """
    windows: List[Dict[str, Any]] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        if windows and start - begin >= seconds:
            return windows
        times: List[float] = []
        now = start
        while not times or now - start < min(WINDOW_S, seconds):
            before = now
            call()
            now = time.perf_counter()
            times.append((now - before) * 1e3)
        times.sort()
        p95 = times[min(len(times) - 1, int(0.95 * len(times)))]
        found = {"t_s": round(start - begin, 3), "calls": len(times), "p50_ms": statistics.median(times), "p95_ms": p95}
        windows.append(found)


def _measure_energy(runners: List[Runner], job: Request, models: Dict[str, Dict[str, Any]]) -> None:
    """Add ``energy_mj`` per call, of the whole device while it runs one model, where something counts it."""
    if not job.get("energy") or not (_energy_counters() or _power_w() is not None):
        return
    _phase("energy")
    for runner in runners:
        used = energy_per_call(runner.call)
        if used is not None:
            models[runner.name]["energy_mj"] = used


def energy_per_call(call: Callable[[], Any], seconds: float = 1.0) -> Optional[float]:
    """Millijoules; from counters of energy if there are any, else from the mean of a power sensor."""
    before, powers, calls = _energy_counters(), [], 0
    begin = due = time.monotonic()
    while time.monotonic() - begin < seconds or calls < 3:
        call()
        calls += 1
        if not before and time.monotonic() >= due:
            powers.append(_power_w() or 0.0)
            due = time.monotonic() + 0.02
    elapsed = time.monotonic() - begin
    if before:
        used = _microjoules(before, _energy_counters())
        return used / 1e3 / calls if used > 0 else None
    mean = statistics.mean(powers)
    return mean * elapsed * 1e3 / calls if mean > 0 else None


def _energy_counters() -> Dict[str, int]:
    """Microjoules by file: of the CPU packages (powercap), else of the energy sensors (hwmon)."""
    packages = [
        path
        for path in glob.glob(os.path.join(glob.escape(SYSROOT), "sys/class/powercap/*:*/energy_uj"))
        if os.path.dirname(path).count(":") == 1 and _read(os.path.join(os.path.dirname(path), "name")) != "psys"
    ]
    sensors = glob.glob(os.path.join(glob.escape(SYSROOT), "sys/class/hwmon/hwmon*/energy*_input"))
    for group in (packages, sensors):
        values = {path: _read_int(path) for path in group}
        known = {path: value for path, value in values.items() if value is not None}
        if known:
            return known
    return {}


def _microjoules(before: Dict[str, int], after: Dict[str, int]) -> float:
    """Energy between two readings; packages add up, of sensors (which may overlap) the largest counts."""
    used = []
    for path, start in before.items():
        change = after.get(path, start) - start
        if change < 0:  # the counter began anew
            change += (_read_int(os.path.join(os.path.dirname(path), "max_energy_range_uj")) or 0) + 1
        used.append(max(change, 0))
    return sum(used) if any("powercap" in path for path in before) else max(used, default=0)


def _power_w() -> Optional[float]:
    """The largest of the power sensors (hwmon): watts, or volts times amperes where a board gives those (INA3221)."""
    watts = []
    for folder in glob.glob(os.path.join(glob.escape(SYSROOT), "sys/class/hwmon/hwmon*")):
        for path in glob.glob(os.path.join(glob.escape(folder), "power*_input")):
            micro = _read_int(path)
            if micro is not None:
                watts.append(micro / 1e6)
        for path in glob.glob(os.path.join(glob.escape(folder), "curr*_input")):
            milliamperes, millivolts = _read_int(path), _read_int(path.replace("curr", "in"))
            if milliamperes is not None and millivolts is not None:
                watts.append(milliamperes * millivolts / 1e6)
    return max(watts, default=None)


def _profile_nodes(runtime: Runtime, runners: List[Runner], job: Request, models: Dict[str, Dict[str, Any]]) -> None:
    """Add ``nodes``: the time of each node, where the runtime can tell."""
    if not job.get("profile") or not hasattr(runtime.module, "profile"):
        return
    _phase("profile")
    for runner in runners:
        arguments = (runner.path, job["threads"], job["provider"], runner.feed, job["work"])
        try:
            models[runner.name]["nodes"] = runtime.module.profile(*arguments)
        except OSError:
            raise
        except Exception as error:
            raise runtime.error("model-run", runner.name, error) from error


def _verify(model: Dict[str, str]) -> None:
    try:
        digest = _sha256(model["path"])
    except OSError as error:
        raise AgentError("model-load", "%s: %s" % (model["path"], error.strerror)) from error
    if digest != model["sha256"]:
        raise AgentError("sha256-mismatch", "%s: expected %s, found %s" % (model["name"], model["sha256"], digest))
    if os.path.dirname(model["path"]) == os.path.join(store_path(), "models"):
        with contextlib.suppress(OSError):
            os.utime(model["path"])  # a sweep removes those that were used longest ago


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class Runtime:
    """A runtime's file, imported, and the runtime itself with it.

    Raises:
        AgentError: there is no such file, or it does not fit this Python.
        ImportError: the runtime is not installed here, or does not fit this device.
    """

    def __init__(self, job: Request) -> None:
        self.name = job.get("runtime", RUNTIME)
        here = os.path.dirname(os.path.abspath(__file__))
        path = job.get("runtime_file") or os.path.join(here, "runtimes", self.name + ".py")
        spec = importlib.util.spec_from_file_location("secateur_runtime_" + re.sub(r"\W", "_", self.name), path)
        if spec is None or spec.loader is None or not os.path.isfile(path):
            raise AgentError("missing-runtime", "no file of the runtime %s at %s" % (self.name, path))
        self.module: Any = importlib.util.module_from_spec(spec)
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left beside the file
        try:
            spec.loader.exec_module(self.module)
            sys.dont_write_bytecode = writes
            self.facts = self.module.facts()
        except ImportError:
            raise
        except Exception as error:
            detail = "the runtime %s failed here: %s: %s" % (self.name, type(error).__name__, error)
            raise AgentError("missing-runtime", detail) from error

    def described(self) -> Dict[str, Any]:
        import numpy as np

        return {self.name: self.facts["version"], "numpy": np.__version__, "providers": self.facts["providers"]}

    def require(self, provider: str) -> None:
        if provider not in self.facts["providers"]:
            known = ", ".join(self.facts["providers"])
            detail = "no execution provider %s; this %s has %s" % (provider, self.name, known)
            raise AgentError("missing-runtime", detail)

    def provider(self, session: Any) -> str:
        """What a session really uses; a runtime that does not tell uses the CPU."""
        return str(self.module.provider(session)) if hasattr(self.module, "provider") else CPU

    def load(self, model: Dict[str, str], threads: int, provider: str) -> Any:
        """A session that computes in what the model asks for.

        Raises:
            AgentError: ``model-load``: this runtime cannot be told to.
        """
        asked, known = model.get("precision", FP32), list(getattr(self.module, "PRECISIONS", [FP32]))
        if asked not in known:
            detail = "%s: the runtime %s computes in %s, not in %s" % (
                model["name"],
                self.name,
                ", ".join(known),
                asked,
            )
            raise AgentError("model-load", detail)
        return self.module.load(model["path"], threads, provider, **({} if asked == FP32 else {"precision": asked}))

    def precision(self, session: Any, model: Dict[str, str]) -> Dict[str, str]:
        """What was asked for and, where the runtime tells, what is really computed in.

        Raises:
            AgentError: ``model-load``: that is another precision.
        """
        asked = model.get("precision", FP32)
        if not hasattr(self.module, "precision"):
            return {"precision_asked": asked}
        used = str(self.module.precision(session))
        parts = set(filter(None, used.split("+")))
        if parts - {asked, FP32, INT8} or parts == {FP32} != {asked}:  # quantised files compute in int8 by themselves
            detail = "%s: %s computes in %s, where %s was asked for" % (model["name"], self.name, used, asked)
            raise AgentError("model-load", detail)
        return {"precision_asked": asked, "precision_used": used} if used else {"precision_asked": asked}

    def error(self, code: str, name: str, error: Exception) -> AgentError:
        """What an exception over a model means, with the fix; ``code`` where it is none of the known causes."""
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or re.search(r"bad_alloc|Failed to allocate memory|Cannot allocate", text):
            return AgentError("no-memory", "%s: %s; %s" % (name, text, MEMORY_FIX))
        if hasattr(self.module, "explain"):
            known = self.module.explain(error, name, self.facts["version"])
            if known is not None:
                return AgentError(known[0] or code, known[1])
        return AgentError(code, "%s: %s: %s" % (name, type(error).__name__, text))


def _import_runtime(job: Request) -> Tuple[Runtime, float]:
    """The runtime, and the milliseconds its import took."""
    _phase("import")
    begin = time.perf_counter_ns()
    try:
        import numpy  # noqa: F401

        runtime = Runtime(job)
    except ImportError as error:
        text = " ".join(str(error).rpartition("Original error was:")[2].split())  # numpy writes a page around it
        if re.search("failed to map segment|[Cc]annot allocate memory", text):
            raise AgentError("no-memory", "%s; %s" % (text, MEMORY_FIX)) from error
        here = "this is Python %s on %s" % (platform.python_version(), platform.machine())
        if re.search("wrong ELF class|invalid ELF header|seem incompatible|cannot open shared object", str(error)):
            here = "what is installed was built for another Python or machine; " + here
        name = job.get("runtime", RUNTIME)
        raise AgentError("missing-runtime", "%s; run: pip install %s numpy (%s)" % (text[:300], name, here)) from error
    return runtime, (time.perf_counter_ns() - begin) / 1e6


def _pin(cores: Optional[List[int]]) -> Optional[List[int]]:
    """Pin to these cores; None where that is not allowed."""
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        return cores or None
    except (AttributeError, OSError):
        return None


# ---- descriptions and readings ----


def describe_limits() -> Dict[str, Any]:
    """What there is room for: the store, memory, cores, the lock, and what can be read and limited."""
    store = store_path()
    there = store
    while not os.path.isdir(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    limits: Dict[str, Any] = {
        "store": store,
        "store_writable": os.access(there, os.W_OK | os.X_OK),
        "lock": _lock_state(),
        "sensors": sorted(read_sensors([0])),
        "cgroup": [folder for folder in cgroup_folders() if os.access(folder, os.W_OK)],
        "energy": "counter" if _energy_counters() else "power" if _power_w() is not None else "none",
        "memory_total_bytes": memory("MemTotal"),
        "memory_available_bytes": memory("MemAvailable"),
    }
    with contextlib.suppress(OSError):
        limits["free_bytes"] = shutil.disk_usage(there).free
    with contextlib.suppress(AttributeError, OSError):
        limits["cores"] = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(ValueError, OSError):
        limits["libc"] = os.confstr("CS_GNU_LIBC_VERSION")
    return {key: value for key, value in limits.items() if value is not None}


def _lock_state() -> Dict[str, Any]:
    """Whether somebody measures now, and who."""
    try:
        lock = _open_lock()
    except OSError:
        return {"held": False}
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return dict(_holder(lock), held=True)
    finally:
        os.close(lock)
    return {"held": False}


def describe_device() -> Dict[str, Any]:
    """System and whatever clocks and temperatures can be read; of the machine's name only what tells it from others."""
    facts: Dict[str, Any] = {
        "host_sha256": hashlib.sha256(platform.node().encode("utf-8", "replace")).hexdigest()[:16],
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    for line in (_read("proc/cpuinfo") or "").splitlines():
        if line.split(":")[0].strip() in ("model name", "Model"):
            facts.setdefault("cpu", line.split(":", 1)[1].strip())
    cpufreq = "sys/devices/system/cpu/cpu0/cpufreq/"
    readings = {
        "board": (_read("proc/device-tree/model") or "").strip("\0\n ") or None,
        "governor": _read(cpufreq + "scaling_governor"),
        "freq_mhz": _scaled(_read_int(cpufreq + "scaling_cur_freq"), 1e-3),
        "freq_max_mhz": _scaled(_read_int(cpufreq + "scaling_max_freq"), 1e-3),
        "temperature_c": _temperature(),
    }
    facts.update({key: value for key, value in readings.items() if value is not None})
    return facts


def _temperature() -> Optional[float]:
    """The hottest thermal zone, degrees Celsius."""
    zones = glob.glob(os.path.join(SYSROOT, "sys/class/thermal/thermal_zone*/temp"))
    readings = [_read_int(os.path.relpath(zone, SYSROOT)) for zone in zones]
    return max((value / 1000 for value in readings if value is not None), default=None)


def _load_signals() -> Dict[str, float]:
    """Counters that tell whether somebody else uses the device."""
    signals: Dict[str, float] = {"time_s": time.monotonic()}
    signals["nivcsw"] = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    pressure = _pressure()
    if pressure is not None:
        signals["psi_us"] = pressure
    ticks = ((_read("proc/stat") or "").splitlines() or [""])[0].split()[1:9]
    if len(ticks) == 8:
        signals["ticks"], signals["stolen"] = sum(map(int, ticks)), int(ticks[7])
    return signals


def _load_during(before: Dict[str, float], after: Dict[str, float]) -> Dict[str, Any]:
    elapsed = max(after["time_s"] - before["time_s"], 1e-9)
    facts: Dict[str, Any] = {"elapsed_s": elapsed, "nivcsw": int(after["nivcsw"] - before["nivcsw"])}
    if "psi_us" in before and "psi_us" in after:
        facts["cpu_pressure"] = (after["psi_us"] - before["psi_us"]) / 1e6 / elapsed
    if "ticks" in before and "ticks" in after:
        facts["steal"] = (after["stolen"] - before["stolen"]) / max(after["ticks"] - before["ticks"], 1)
    with contextlib.suppress(OSError):
        facts["loadavg"] = list(os.getloadavg())
    return facts


def _reset_peak() -> Optional[int]:
    """Set the peak RSS back to the RSS of now (proc(5), clear_refs = 5); returns that RSS."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> Optional[int]:
    """A memory line of /proc/self/status; getrusage would report the peak of the process that started us."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _read(path: str) -> Optional[str]:
    try:
        with open(os.path.join(SYSROOT, path)) as file:
            return file.read().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _read_int(path: str) -> Optional[int]:
    try:
        return int(_read(path) or "")
    except ValueError:
        return None


def _scaled(value: Optional[int], factor: float) -> Optional[float]:
    return None if value is None else value * factor


if __name__ == "__main__":
    sys.exit(worker_main() if "--worker" in sys.argv[1:] else main())
