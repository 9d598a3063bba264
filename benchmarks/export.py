"""Which of torchvision's networks can be pruned to half and shipped: to ONNX Runtime, OpenVINO and ncnn.

    python benchmarks/export.py [--only REGEX] [--state PATH] [--write PATH] [--json PATH] [--seconds 600]

Classification, segmentation and SSD networks of at most 60 M parameters, random weights, one example. Each runs in a
process of its own under a time limit: half of the channels of every group are kept, the network is pruned and exported,
and its file is run by each runtime beside the pruned network in PyTorch. SSD networks are without their postprocessing,
as the pipeline builds them.

- ok: the file loads, and no output differs by more than 1e-4 of its largest magnitude (ncnn: 1e-3, whose convolutions
  are Winograd's);
- else the reason, in the words of whoever refused.

`--state` keeps each network's row in a file, and a benchmark that was ended goes on from there; networks can be run one
by one with `--only`. `--write` writes a page of all rows in that file, those that were not run left out.

`export_ort`, `export_openvino`, `export_ncnn`: share of the networks that are ok there. `export_explained`: share of
the failures that have a reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from benchmarks._zoo import build, calibrate, randomise, torchvision_names
from secateur.device_profiles.runtimes import ncnn, openvino
from secateur.device_profiles.wording import printable
from secateur.export.errors import ExportError
from secateur.export.formats import ncnn as ncnn_format
from secateur.export.onnx_export import evaluating, export_onnx
from secateur.export.verify import verify_parity
from secateur.pruning import prune, uniform_plan
from secateur.pruning.trace import trace

Row = dict[str, Any]
MOST_PARAMETERS = 60_000_000
KEPT = 0.5
TOLERANCE = {"ort": 1e-4, "openvino": 1e-4, "ncnn": 1e-3}
LEAST = {"ort": 0.95, "openvino": 0.95, "ncnn": 0.80}
DETECTORS = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
SEGMENTATION = ("deeplabv3", "fcn_", "lraspp")
LEFT_OUT = ("rcnn", "retinanet", "fcos", "raft", "mvit", "s3d", "r3d", "mc3", "r2plus1d", "swin3d")
"""Detectors with postprocessing inside, optical flow, video."""
REASON = 200
SAID = "secateur export benchmark: "


def names() -> list[str]:
    """Those of torchvision that are asked for."""
    found = [name for name in torchvision_names() if not any(word in name for word in LEFT_OUT)]
    return sorted({*found, *DETECTORS})


class FirstOutput(nn.Module):
    """A segmentation network whose output is a tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of every pixel."""
        out: torch.Tensor = self.network(x)["out"]
        return out


def network_named(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network in eval mode with random weights, and an example input."""
    if name in DETECTORS:
        from secateur.pipeline.workloads.detection.networks import build_detector

        torch.manual_seed(0)
        example = torch.randn(1, 3, DETECTORS[name], DETECTORS[name])
        model = randomise(build_detector(name, 20, {}).eval())
        calibrate(model, (example,))
        return model, example
    model, (example,) = build("torchvision", name)
    return (FirstOutput(model).eval() if name.startswith(SEGMENTATION) else model), example


def look(name: str) -> Row:
    """One network: what each runtime makes of its file; ``ok`` or the reason."""
    model, example = network_named(name)
    parameters = sum(p.numel() for p in model.parameters())
    row: Row = {"network": name, "parameters": parameters}
    if parameters > MOST_PARAMETERS:
        return {**row, "left out": "more than 60 M parameters"}
    graph = trace(model, example)
    pruned = prune(model, graph, uniform_plan(graph, KEPT, model=model, saliency="random", seed=0)).eval()
    row["kept"] = sum(p.numel() for p in pruned.parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pruned.onnx")
        try:
            export_onnx(pruned, example, file)
        except ExportError as error:
            return row | dict.fromkeys(TOLERANCE, f"not exported: {told(error)}")
        with evaluating(pruned), torch.no_grad():
            answers = pruned(example)
        expected = [answer.numpy() for answer in (answers if isinstance(answers, tuple) else (answers,))]
        parity = verify_parity(file, pruned, [example.numpy()], TOLERANCE["ort"])
        row["ort"] = "ok" if parity.ok else parity.reason
        row["openvino"] = judged("openvino", openvino, file, example, expected)
        converted = Path(folder, "pruned.ncnn")
        try:
            ncnn_format.write(file, converted)
        except ExportError as error:
            row["ncnn"] = f"not converted: {told(error)}"
        else:
            row["ncnn"] = judged("ncnn", ncnn, converted, example, expected)
    return row


def judged(name: str, runtime: Any, file: Path, example: torch.Tensor, expected: Sequence[np.ndarray]) -> str:
    """``ok``, or why a runtime does not give the network's outputs."""
    try:
        session = runtime.load(str(file), 1, "CPUExecutionProvider")
        feeds = {port[0]: example.numpy() for port in runtime.inputs(session)}
        found = runtime.run(session, feeds)
    except Exception as error:  # noqa: BLE001 - it raises whatever the runtime does
        return f"does not run: {told(error)}"
    if [a.shape for a in found] != [b.shape for b in expected]:
        return f"output shapes {[a.shape for a in found]}, expected {[b.shape for b in expected]}"
    errors = [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in zip(found, expected, strict=True)]
    return "ok" if max(errors) <= TOLERANCE[name] else f"relative error {max(errors):.1e} exceeds {TOLERANCE[name]:g}"


def told(error: BaseException) -> str:
    """An error in a line."""
    return printable(" ".join((str(error).strip() or repr(error)).split()))[:REASON]


def in_a_process(name: str, seconds: float) -> Row:
    """``look`` in a process of its own, so that what it takes or breaks is its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"network": name} | dict.fromkeys(TOLERANCE, f"not done after {seconds:g} s")
    line = next((line for line in done.stdout.splitlines() if line.startswith(SAID)), None)
    if line is not None:
        found: Row = json.loads(line.removeprefix(SAID))
        return found
    last = ([line for line in done.stderr.splitlines() if line.strip()] or [f"ended with code {done.returncode}"])[-1]
    return {"network": name} | dict.fromkeys(TOLERANCE, printable(last)[:REASON])


def known(state: Path | None, versions: str) -> dict[str, Row]:
    """Rows of earlier runs with the same packages, by network."""
    lines = state.read_text(encoding="utf-8").splitlines() if state is not None and state.is_file() else []
    return {row["network"]: row for line in lines if (row := json.loads(line)).pop("versions") == versions}


def versions_here() -> str:
    """What the rows depend on."""
    packages = ("torch", "torchvision", "onnxruntime", "openvino", "ncnn", "pnnx")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    figures = []
    for name, least in LEAST.items():
        share = sum(row[name] == "ok" for row in rows) / len(rows)
        figures.append(Figure(f"export_{name}", share, least, share >= least))
    reasons = [row[name] for row in rows for name in LEAST if row[name] != "ok"]
    explained = sum(bool(reason.strip()) for reason in reasons) / len(reasons) if reasons else 1.0
    return [*figures, Figure("export_explained", explained, 1.0, explained == 1.0)]


def page_of(rows: Sequence[Row], left_out: int, asked: int, versions: str) -> str:
    """The page, in Markdown."""
    cells = [
        f"| {row['network']} | {row.get('parameters', 0) / 1e6:.1f} | "
        + " | ".join(row[name].replace("|", "\\|") for name in LEAST)
        + " |"
        for row in rows
    ]
    shares = ", ".join(f"{name} {sum(row[name] == 'ok' for row in rows)} of {len(rows)}" for name in LEAST)
    missing = asked - len(rows) - left_out
    note = f" {missing} further networks were not run." if missing else ""
    text = f"""# Export

Written by `python benchmarks/export.py --write` ({versions}).
Networks of torchvision, half of the channels of every group removed, exported and run beside the pruned network in
PyTorch. What ok means is said at the top of `benchmarks/export.py`.

Ok: {shares}; {left_out} networks of more than 60 M parameters are left out.{note}

| network | M parameters | ONNX Runtime | OpenVINO | ncnn |
|---|---|---|---|---|
"""
    return text + "\n".join(cells) + "\n"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", default="", metavar="REGEX", help="networks to run")
    arguments.add_argument("--state", type=Path, metavar="PATH", help="keep rows here, and go on from those in it")
    arguments.add_argument("--write", type=Path, metavar="PATH", help="write a page of all known rows")
    arguments.add_argument("--seconds", type=float, default=600.0, help="for one network, at most (default 600)")
    arguments.add_argument("--one", default="", metavar="NAME", help="look at one network in this very process")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.one:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(SAID + json.dumps(look(options.one)))
        return
    versions, asked = versions_here(), names()
    found = known(options.state, versions)
    for name in asked:
        if name in found or not re.search(options.only, name):
            continue
        row = found[name] = in_a_process(name, options.seconds)
        print(f"{name}: " + ", ".join(f"{key} {row[key]}" for key in LEAST if key in row), flush=True)
        if options.state is not None:
            with options.state.open("a", encoding="utf-8") as kept:
                kept.write(json.dumps({**row, "versions": versions}) + "\n")
    rows = [found[name] for name in asked if name in found and "left out" not in found[name]]
    if not rows:
        sys.exit("no network was run; see --only")
    if options.write is not None:
        options.write.write_text(page_of(rows, len(found) - len(rows), len(asked), versions), encoding="utf-8")
    present(
        "Pruned to half, exported, and run",
        [{key: row[key] for key in ("network", *LEAST)} for row in rows],
        figures_of(rows),
        options.json,
    )


if __name__ == "__main__":
    main()
