"""The one file that runs on the device: Python >= 3.8, standard library + numpy + onnxruntime, nothing of ours.

Reads one JSON request line on stdin, writes JSON lines on stdout; the last one is the answer. Protocol version 1:

    {"protocol": 1, "op": "benchmark", "models": [{"name", "path", "sha256"}], "provider", "threads", "warmup",
     "min_repeats", "min_seconds", "max_seconds", "seed", "parent_pid" (optional)}
    {"protocol": 1, "op": "probe"}

Models are timed in turn, A B A B ..., so that whatever the machine does to one it does to the other. Every latency is
reported, wall and CPU time. An error is ``{"error": code, "detail": text}`` and an exit code of its own. What cannot
be read on this device is left out of the answer: absent, never zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import glob
import hashlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional, Tuple

PROTOCOL = 1
EXIT_CODES = {
    "bad-request": 64,
    "sha256-mismatch": 65,
    "model-load": 66,
    "missing-runtime": 69,
    "model-run": 70,
    "busy": 75,  # EX_TEMPFAIL: try again later
}
SYSROOT = os.environ.get("EDGE_SYSROOT", "/")
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class AgentError(Exception):
    """An error with a code of ``EXIT_CODES``."""

    def __init__(self, code: str, detail: str) -> None:
        Exception.__init__(self, detail)
        self.code = code


def main() -> int:
    _die_with_parent()
    try:
        request = _read_request(sys.stdin.readline())
        if request.get("parent_pid", os.getppid()) != os.getppid():
            return 1  # the parent died before we asked the kernel to be told
        if request["op"] == "probe":
            answer: Dict[str, Any] = {"device": describe_device(), "runtime": describe_runtime(_import_runtime())}
        else:
            lock = take_lock()
            try:
                answer = benchmark(request)
            finally:
                os.close(lock)
    except AgentError as error:
        print(json.dumps({"error": error.code, "detail": str(error)}), flush=True)
        return EXIT_CODES[error.code]
    answer["protocol"] = PROTOCOL
    print(json.dumps(answer), flush=True)
    return 0


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG = SIGKILL (prctl(2)): no orphan keeps the device busy."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 9)


def _read_request(line: str) -> Dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError:
        raise AgentError("bad-request", "the request is not one line of JSON: %r" % line[:80]) from None
    if not isinstance(request, dict) or request.get("protocol") != PROTOCOL:
        raise AgentError("bad-request", "this agent speaks protocol %d" % PROTOCOL)
    if request.get("op") == "probe":
        return request
    if request.get("op") != "benchmark":
        raise AgentError("bad-request", "op must be 'benchmark' or 'probe', got %r" % (request.get("op"),))
    kinds: Dict[str, Any] = {
        "models": list, "provider": str, "threads": int, "warmup": int, "min_repeats": int,
        "min_seconds": (int, float), "max_seconds": (int, float), "seed": int,
    }  # fmt: skip
    wrong = [key for key, kind in kinds.items() if not isinstance(request.get(key), kind)]
    models = request["models"] if "models" not in wrong else []
    if not models or not all(isinstance(m, dict) and {"name", "path", "sha256"} <= set(m) for m in models):
        wrong.append("models[].name/path/sha256")
    if "threads" not in wrong and request["threads"] < 1:
        wrong.append("threads >= 1")
    if wrong:
        raise AgentError("bad-request", "missing or of the wrong type: " + ", ".join(wrong))
    return request


def take_lock() -> int:
    """Lock this device, or fail at once; the kernel lets go when the process dies, so no lock is ever stale."""
    import fcntl

    path = os.path.join(tempfile.gettempdir(), "secateur-device.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # another user's file: flock needs no write permission
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise AgentError("busy", "the device is measuring for another process; holder pid %s" % holder) from None
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    return lock


def benchmark(request: Dict[str, Any]) -> Dict[str, Any]:
    """Load all models, warm up, then time them in turn."""
    started = time.time()
    for model in request["models"]:
        _verify(model)
    cores = _pin(request["threads"])
    ort = _import_runtime()
    base_rss = _status_bytes("VmRSS")
    runners = [Runner(ort, model, request) for model in request["models"]]
    for runner in runners:
        for _ in range(request["warmup"]):
            runner.call()
    before = _load_signals()
    gc.disable()
    wall, cpu = _interleave(runners, request)
    gc.enable()
    environment = describe_device()
    environment.update(describe_runtime(ort))
    environment.update(_load_during(before, _load_signals()))
    environment["provider"] = runners[0].provider
    environment["threads"] = request["threads"]
    if cores:
        environment["cores"] = cores
    models = {}
    for i, runner in enumerate(runners):
        models[runner.name] = dict(runner.facts, wall_ms=wall[i], cpu_ms=cpu[i])
        if base_rss and "peak_rss_bytes" in runner.facts:
            models[runner.name]["peak_rss_bytes"] += base_rss
    answer = {"models": models, "environment": environment, "started": started, "ended": time.time()}
    if base_rss:
        answer["runtime_rss_bytes"] = base_rss
    return answer


def _interleave(runners: "List[Runner]", request: Dict[str, Any]) -> Tuple[List[List[float]], List[List[float]]]:
    """Milliseconds per model and iteration: wall and CPU."""
    wall: List[List[float]] = [[] for _ in runners]
    cpu: List[List[float]] = [[] for _ in runners]
    begin = time.perf_counter()
    repeats = 0
    while True:
        for i, runner in enumerate(runners):
            w0 = time.perf_counter_ns()
            c0 = time.process_time_ns()
            runner.call()
            c1 = time.process_time_ns()
            w1 = time.perf_counter_ns()
            wall[i].append((w1 - w0) / 1e6)
            cpu[i].append((c1 - c0) / 1e6)
        repeats += 1
        elapsed = time.perf_counter() - begin
        enough = repeats >= request["min_repeats"] and elapsed >= request["min_seconds"]
        if enough or (elapsed >= request["max_seconds"] and repeats >= 3):
            return wall, cpu


class Runner:
    """One model, loaded, with its input."""

    def __init__(self, ort: Any, model: Dict[str, str], request: Dict[str, Any]) -> None:
        self.name = model["name"]
        rss = _reset_peak()
        t0 = time.perf_counter_ns()
        try:
            self.session = self._open(ort, model["path"], request)
            t1 = time.perf_counter_ns()
            self.feed = {i.name: _random_input(i, request["seed"]) for i in self.session.get_inputs()}
        except AgentError:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise AgentError("model-load", "%s: %s: %s" % (self.name, type(error).__name__, error)) from error
        self.provider = self.session.get_providers()[0]
        if self.provider != request["provider"]:
            detail = "%s runs on %s, not on %s" % (self.name, self.provider, request["provider"])
            raise AgentError("model-load", detail)
        t2 = time.perf_counter_ns()
        try:
            outputs = self.call()
        except Exception as error:
            raise AgentError("model-run", "%s: %s: %s" % (self.name, type(error).__name__, error)) from error
        t3 = time.perf_counter_ns()
        digest = hashlib.sha256()
        for output in outputs:
            digest.update(output.tobytes() if hasattr(output, "tobytes") else repr(output).encode())
        self.facts: Dict[str, Any] = {
            "load_ms": (t1 - t0) / 1e6,
            "first_ms": (t3 - t2) / 1e6,
            "output_sha256": digest.hexdigest(),
        }
        peak = _status_bytes("VmHWM")
        if peak and rss:
            self.facts["peak_rss_bytes"] = peak - rss  # benchmark() adds what the runtime itself takes

    def _open(self, ort: Any, path: str, request: Dict[str, Any]) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = request["threads"]
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if request["threads"] > 1:  # spinning workers on shared cores spoil wall and CPU time alike
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        known = ort.get_available_providers()
        if request["provider"] not in known:
            detail = "no execution provider %s; this onnxruntime has %s" % (request["provider"], ", ".join(known))
            raise AgentError("missing-runtime", detail)
        return ort.InferenceSession(path, options, providers=[request["provider"]])

    def call(self) -> List[Any]:
        return self.session.run(None, self.feed)  # type: ignore[no-any-return]


def _random_input(spec: Any, seed: int) -> Any:
    """Standard normal (or small integers) of the model's own shape; a dynamic dimension is 1."""
    import numpy as np

    shape = [d if isinstance(d, int) and d > 0 else 1 for d in spec.shape]
    if spec.type not in DTYPES:
        raise AgentError("model-load", "input %s is a %s; known: %s" % (spec.name, spec.type, ", ".join(DTYPES)))
    rng = np.random.default_rng([seed, *shape])
    kind = np.dtype(DTYPES[spec.type])
    values = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
    return np.ascontiguousarray(values.astype(kind))


def _verify(model: Dict[str, str]) -> None:
    try:
        with open(model["path"], "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise AgentError("model-load", "%s: %s" % (model["path"], error.strerror)) from error
    if found != model["sha256"]:
        raise AgentError("sha256-mismatch", "%s: expected %s, found %s" % (model["name"], model["sha256"], found))


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise AgentError("missing-runtime", "%s; run: pip install onnxruntime numpy" % error) from error
    return onnxruntime


def _pin(threads: int) -> Optional[List[int]]:
    """Pin to as many cores as threads, the fastest ones first; None where that is not allowed."""
    try:
        allowed = os.sched_getaffinity(0)
        speed = {
            core: _read_int("sys/devices/system/cpu/cpu%d/cpufreq/cpuinfo_max_freq" % core) or 0 for core in allowed
        }
        cores = sorted(allowed, key=lambda core: (-speed[core], -core))[:threads]
        os.sched_setaffinity(0, cores)
        return sorted(cores)
    except (AttributeError, OSError):
        return None


def describe_runtime(ort: Any) -> Dict[str, Any]:
    import numpy as np

    return {"onnxruntime": ort.__version__, "numpy": np.__version__, "providers": ort.get_available_providers()}


def describe_device() -> Dict[str, Any]:
    """Host, system and whatever clocks and temperatures can be read."""
    facts: Dict[str, Any] = {
        "host": platform.node(),
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
    found = [_read_int(os.path.relpath(zone, SYSROOT)) for zone in zones]
    return max((value / 1000 for value in found if value is not None), default=None)


def _load_signals() -> Dict[str, float]:
    """Counters that tell whether somebody else uses the device."""
    signals: Dict[str, float] = {"time_s": time.monotonic()}
    signals["nivcsw"] = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    for line in (_read("proc/pressure/cpu") or "").splitlines():
        if line.startswith("some") and "total=" in line:
            signals["psi_us"] = float(line.rsplit("total=", 1)[1])
    return signals


def _load_during(before: Dict[str, float], after: Dict[str, float]) -> Dict[str, Any]:
    elapsed = max(after["time_s"] - before["time_s"], 1e-9)
    facts: Dict[str, Any] = {"elapsed_s": elapsed, "nivcsw": int(after["nivcsw"] - before["nivcsw"])}
    if "psi_us" in before and "psi_us" in after:
        facts["cpu_pressure"] = (after["psi_us"] - before["psi_us"]) / 1e6 / elapsed
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
    sys.exit(main())
