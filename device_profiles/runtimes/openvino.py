"""OpenVINO.

Lies beside the agent on the device: Python >= 3.8, standard library + numpy + openvino, nothing of ours.

It reads ONNX files as they are, quantised ones (QDQ) too: what is timed is the file that was checked, and OpenVINO's
own files, which its tools write in fp16 unless told otherwise, are not needed. Two things it does unless it is told
not to: it computes in bf16 where the processor can, and importing it reports that to its makers over the network.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Dict, List, Optional, Tuple

FORMAT = "onnx"
PACKAGES = {"CPUExecutionProvider": "openvino", "GPU": "openvino", "NPU": "openvino"}
WHEELS = {"python": (3, 10), "glibc": {"x86_64": (2, 28), "aarch64": (2, 35)}}
OLDEST = (2023, 1)
INSTALL_HINT = "openvino 2025.2 has wheels for Python 3.9 and, on aarch64, for glibc 2.31"
PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
CPU = "CPUExecutionProvider"  # the agent's word for the processor
LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Types of the nodes by which precision is told: those that multiply and accumulate."""


def facts() -> Dict[str, Any]:
    """Version and devices."""
    openvino = _openvino()
    devices = openvino.Core().available_devices
    version = re.match(r"[\d.]+", openvino.__version__)
    return {
        "version": version[0] if version else "0",
        "providers": [CPU if name == "CPU" else name for name in devices],
    }


def _openvino() -> Any:
    """The package without its telemetry: with no module of that name it takes a stub that does nothing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class Session:
    """A compiled network and the request that runs it; names are the file's, for compiling may merge tensors."""

    def __init__(self, model: Any, compiled: Any, provider: str) -> None:
        self.compiled, self.provider = compiled, provider
        self.request = compiled.create_infer_request()
        self.inputs = [port.get_any_name() for port in model.inputs]
        self.outputs = [_output_name(result) for result in model.get_results()]


def _output_name(result: Any) -> str:
    """The name that an output has in its file: a tensor without an operation of its own has several."""
    name, names = str(result.get_friendly_name()).rpartition("/sink_port_")[0], result.output(0).get_names()
    return name if name in names else sorted(names)[0]


def load(path: str, threads: int, provider: str, precision: str = "fp32") -> Session:
    """A session.

    Args:
        precision: what layers of floating point compute in; those of a quantised file compute in int8.
    """
    device = "CPU" if provider == CPU else provider
    settings: Dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        settings.update(INFERENCE_NUM_THREADS=threads, NUM_STREAMS="1")
    core = _openvino().Core()
    with open(path, "rb") as file:  # by its content: a reader that fails on a path tries every format it knows
        model = core.read_model(file.read())
    return Session(model, core.compile_model(model, device, settings), provider)


def inputs(session: Session) -> List[Tuple[str, List[Any], str]]:
    """Name, shape and number type of every input; a dynamic dimension is None."""
    return [
        (name, [d.get_length() if d.is_static else None for d in port.partial_shape], _dtype(port))
        for name, port in zip(session.inputs, session.compiled.inputs)  # noqa: B905 - Python 3.8
    ]


def _dtype(port: Any) -> str:
    import numpy as np

    return str(np.dtype(port.element_type.to_dtype()))


def outputs(session: Session) -> List[str]:
    """Names of the outputs, in the order of ``run``."""
    return list(session.outputs)


def provider(session: Session) -> str:
    """The device that the network really runs on."""
    used = list(session.compiled.get_property("EXECUTION_DEVICES"))
    return session.provider if used in (["CPU"], [session.provider]) else ", ".join(used)


def precision(session: Session) -> str:
    """What its layers really compute in: ``fp32``, ``fp16``, ``bf16`` or ``int8``, several joined by ``+``."""
    kinds = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8"}
    described = [node.get_rt_info() for node in session.compiled.get_runtime_model().get_ops()]
    used = {_said(info, "runtimePrecision").lower() for info in described if _said(info, "layerType") in LAYERS}
    return "+".join(sorted(kinds.get(name, name) for name in used))


def _said(info: Any, key: str) -> str:
    value = info[key] if key in info else ""  # noqa: SIM401 - older versions give no dict
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def run(session: Session, feeds: Dict[str, Any]) -> List[Any]:
    """One call; the arrays are the caller's."""
    session.request.infer([feeds[name] for name in session.inputs], share_inputs=True)
    return [session.request.get_output_tensor(i).data.copy() for i in range(len(session.outputs))]


def explain(error: Exception, name: str, version: str) -> Optional[Tuple[str, str]]:
    """What openvino means by an exception over a model, with the fix; None where it is none of the known causes.

    Returns:
        A code of the agent's (empty = of what was done when it came), and the text.
    """
    text = " ".join(str(error).split())
    operators = re.search(r"No conversion rule found for operations: (.+?)( To facilitate| --|$)", text)
    if operators:
        fix = "replace them, export another opset, or take another runtime"
        return "unknown-operator", "%s: openvino %s has no %s; %s" % (name, version, operators[1], fix)
    if "Unable to read the model" in text:
        return "", "%s: the file is damaged or no ONNX model: export it again" % name
    if not text.startswith("Exception from "):
        return None
    told = re.sub(r"Exception from \S+:\d+: |Check '.*?' failed at \S+:\d+: |FrontEnd API failed with \w+: ", "", text)
    return "", "%s: openvino says: %s" % (name, told[:300])
