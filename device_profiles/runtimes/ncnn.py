"""ncnn.

Lies beside the agent on the device: Python >= 3.8, standard library + numpy + ncnn, nothing of ours.

Its files are those of ``secateur.export.formats.ncnn``. On processors that can, ncnn stores and computes in fp16 unless
it is told not to, with relative errors of 3e-2 on a Cortex-A76; here it does so only where that was asked for.
"""

from __future__ import annotations

import json
import platform
import zipfile
from typing import Any, Dict, List, Optional, Tuple

FORMAT = "ncnn"
PACKAGES = {"CPUExecutionProvider": "ncnn"}
WHEELS = {"python": (3, 8), "glibc": {"x86_64": (2, 28), "aarch64": (2, 28), "armv7l": (2, 31)}}
OLDEST = (1, 0, 20240410)
INSTALL_HINT = "ncnn 1.0.20250503 has wheels for glibc 2.17"
PRECISIONS = ("fp32", "fp16")
CPU = "CPUExecutionProvider"  # the agent's word for the processor


def facts() -> Dict[str, Any]:
    """Version; the processor is all that is used."""
    import ncnn

    return {"version": ncnn.__version__, "providers": [CPU]}


class LoadError(Exception):
    """A file that ncnn cannot load, or does not run."""


class Session:
    """A loaded network; what it is called with keeps ONNX's names and shapes."""

    def __init__(self, net: Any, ports: Dict[str, Any]) -> None:
        self.net, self.inputs, self.outputs = net, ports["inputs"], ports["outputs"]


def load(path: str, threads: int, provider: str, precision: str = "fp32") -> Session:
    """A session.

    Args:
        precision: what layers store and compute in.

    Raises:
        LoadError: the file is damaged, or this ncnn does not know its layers.
    """
    import ncnn

    try:
        with zipfile.ZipFile(path) as archive:
            graph, ports = archive.read("graph.param").decode("utf-8"), json.loads(archive.read("ports.json"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise LoadError("the file is damaged or not of this format: %s; export it again" % error) from error
    net = ncnn.Net()
    _tell(net.opt, threads, precision == "fp16")
    if net.load_param_mem(graph) != 0:
        raise LoadError("this ncnn does not know all of its layers; install a newer one")
    if net.load_model(path) != 0:  # the weights are the beginning of the file
        raise LoadError("its weights cannot be read; export it again")
    return Session(net, ports)


def _tell(options: Any, threads: int, half: bool) -> None:
    options.num_threads = threads
    options.use_vulkan_compute = False
    for name in dir(options):
        if name.startswith(("use_fp16_", "use_bf16_")):
            setattr(options, name, half and name.startswith("use_fp16_"))


def inputs(session: Session) -> List[Tuple[str, List[Any], str]]:
    """Name, shape and number type of every input."""
    return [(port["name"], list(port["shape"]), "float32") for port in session.inputs]


def outputs(session: Session) -> List[str]:
    """Names of the outputs, in the order of ``run``."""
    return [port["name"] for port in session.outputs]


def precision(session: Session) -> str:
    """What is really computed in: fp16 where it was asked for and the processor has it, else fp32."""
    import ncnn

    able = ncnn.cpu_support_arm_asimdhp() if "arm" in _machine() else ncnn.cpu_support_x86_avx2()
    return "fp16" if session.net.opt.use_fp16_storage and able else "fp32"


def _machine() -> str:
    return platform.machine().replace("aarch64", "arm64")


def run(session: Session, feeds: Dict[str, Any]) -> List[Any]:
    """One call; ncnn knows no batches, so that what it is given and gives lacks the first dimension.

    Raises:
        LoadError: a layer fails, or gives another number of values than in ONNX.
    """
    import ncnn
    import numpy as np

    extractor = session.net.create_extractor()
    for port in session.inputs:
        extractor.input(port["blob"], ncnn.Mat(feeds[port["name"]][0]).clone())  # else layers would write to it
    found = []
    for port in session.outputs:
        code, values = extractor.extract(port["blob"])
        if code != 0:
            raise LoadError("ncnn ends with code %d at output %s; is the memory full?" % (code, port["name"]))
        found.append(_shaped(np.array(values), port))
    return found


def _shaped(values: Any, port: Dict[str, Any]) -> Any:
    """An output with the shape that ONNX gives it."""
    shape = [-1 if size is None else size for size in port["shape"]]
    try:
        return values.reshape(shape)
    except ValueError as error:
        text = "ncnn gives output %s the shape %s where ONNX has %s: its conversion is wrong"
        raise LoadError(text % (port["name"], list(values.shape), port["shape"])) from error


def explain(error: Exception, name: str, version: str) -> Optional[Tuple[str, str]]:
    """What an exception over a model means; None where it is none of ours.

    Returns:
        A code of the agent's (empty = of what was done when it came), and the text.
    """
    if not isinstance(error, LoadError):
        return None
    code = "unknown-operator" if "does not know" in str(error) else ""
    return code, "%s: ncnn %s: %s" % (name, version, error)
