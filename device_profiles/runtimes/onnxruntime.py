"""ONNX Runtime.

Lies beside the agent on the device: Python >= 3.8, standard library + numpy + onnxruntime, nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from typing import Any, Dict, List, Optional, Tuple

FORMAT = "onnx"
PACKAGES = {
    "CPUExecutionProvider": "onnxruntime",
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
}
WHEELS = {"python": (3, 11), "glibc": {"x86_64": (2, 28), "aarch64": (2, 28)}}
OLDEST = (1, 17)  # the first that reads operator set 20
INSTALL_HINT = "on armv7 and riscv64, where there is no wheel, Debian's python3-onnxruntime (trixie or newer)"
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


def facts() -> Dict[str, Any]:
    """Version and execution providers."""
    import onnxruntime

    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}


def load(path: str, threads: int, provider: str) -> Any:
    """A session."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, _options(threads), providers=[provider])


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if threads > 1:  # spinning workers on shared cores spoil wall and CPU time alike
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def inputs(session: Any) -> List[Tuple[str, List[Any], str]]:
    """Name, shape and number type of every input."""
    return [(i.name, list(i.shape), DTYPES.get(i.type, i.type)) for i in session.get_inputs()]


def outputs(session: Any) -> List[str]:
    """Names of the outputs, in the order of ``run``."""
    return [output.name for output in session.get_outputs()]


def provider(session: Any) -> str:
    """The execution provider that the session really uses."""
    return str(session.get_providers()[0])


def run(session: Any, feeds: Dict[str, Any]) -> List[Any]:
    """One call."""
    return session.run(None, feeds)  # type: ignore[no-any-return]


def profile(path: str, threads: int, provider: str, feeds: Dict[str, Any], folder: str) -> List[Dict[str, Any]]:
    """The nodes of a model, timed in a session opened for that purpose.

    Raises:
        UnreadableError: the trace is no JSON, as on a full disk.
    """
    import onnxruntime

    options = _options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = os.path.join(folder, "trace")
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    begin, calls = time.monotonic(), 0
    while calls < 3 or (calls < 30 and time.monotonic() - begin < 1.0):
        session.run(None, feeds)
        calls += 1
    trace = session.end_profiling()
    try:
        with open(trace) as file:
            return parse_trace(json.load(file))
    except ValueError as error:
        detail = "onnxruntime wrote no readable profile to %s (%s); is the disk full?" % (trace, error)
        raise UnreadableError(detail) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(trace)


class UnreadableError(Exception):
    """A trace that is no JSON."""


def parse_trace(events: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The nodes of an onnxruntime profile in the order they ran, each with its least time over the calls."""
    nodes: Dict[Tuple[str, str], Dict[str, Any]] = {}
    for event in events:
        name, facts = str(event.get("name", "")), event.get("args") or {}
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        name, index = name[: -len("_kernel_time")], str(facts.get("node_index", ""))
        ms = event["dur"] / 1e3
        node = nodes.get((name, index))
        if node is None:
            node = nodes[(name, index)] = {"name": name, "op": facts.get("op_name", ""), "ms": ms, "calls": 0}
            if index.isdigit():
                node["index"] = int(index)
            for side in ("input", "output"):
                tensors = [pair for entry in facts.get(side + "_type_shape") or [] for pair in entry.items()]
                node[side + "_shapes"] = [shape for _, shape in tensors]
                node[side + "_types"] = [kind for kind, _ in tensors]
        node["ms"] = min(node["ms"], ms)
        node["calls"] += 1
    return list(nodes.values())


def explain(error: Exception, name: str, version: str) -> Optional[Tuple[str, str]]:
    """What onnxruntime means by an exception over a model, with the fix; None where it is none of the known causes.

    Returns:
        A code of the agent's (empty = of what was done when it came), and the text.
    """
    text = " ".join(str(error).split())
    if isinstance(error, UnreadableError):
        return "disk-full", text
    opset = re.search(r"Opset (\d+) is under development.*for domain (\S+) is till opset (\d+)", text)
    version_of_file = re.search(r"model IR version: (\d+), max supported IR version: (\d+)", text)
    if opset:
        needs = "opset %s of %s, this onnxruntime %s knows up to %s" % (opset[1], opset[2], version, opset[3])
        return "runtime-too-old", "%s needs %s; install a newer one or export a lower opset" % (name, needs)
    if version_of_file:
        needs = "IR version %s, this onnxruntime %s knows up to %s" % (version_of_file[1], version, version_of_file[2])
        return "runtime-too-old", "%s needs %s; install a newer one or export with an older IR version" % (name, needs)
    unknown = "NOT_IMPLEMENTED|No Op registered for|is not a registered function/op|Could not find an implementation"
    if re.search(unknown, text):
        fix = "replace this operator, export another opset, or install an onnxruntime that has it"
        return "unknown-operator", "%s: %s; %s" % (name, text, fix)
    if re.search("INVALID_PROTOBUF|No graph was found", text):
        fix = "the file is damaged or no ONNX model: export it again"
        return "", "%s: %s: %s; %s" % (name, type(error).__name__, text, fix)
    return None
