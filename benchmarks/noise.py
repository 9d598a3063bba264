"""How honest an interval is: a network against itself, and against one that is 3 % slower.

    python benchmarks/noise.py [--device local] [--repeats 20] [--tier final] [--json PATH]

A CIFAR ResNet-20 with random weights is measured beside a copy of itself (A/A), and beside itself with one more
convolution of about 3 % of its time (A/B), each `--repeats` times at the tier, one after the other.

`aa_coverage`: share of A/A measurements whose 95 % interval covers the ratio 1. `power_3pct`: share of A/B measurements
whose interval lies above 1. The true ratio of A/B is the median of all its measurements, and printed: it has to be near
1.03 for the figure to mean anything. How wide the intervals are, and how the ratios scatter, stands beside it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from device_profiles import DeviceProfile, Target, load_profile, measure, open_target
from export import export_onnx
from pipeline.workloads.networks import build_network

EXTRA = 0.03
TOLERANCE = 0.01
"""How far the true ratio may lie from 1.03."""


def slower(model: onnx.ModelProto, channels: int) -> onnx.ModelProto:
    """The same network with a convolution ``3 -> channels -> 3`` (3 x 3) before it."""
    grown = copy.deepcopy(model)
    graph, name = grown.graph, grown.graph.input[0].name
    rng = np.random.default_rng(0)
    for node in graph.node:
        for i, value in enumerate(node.input):
            if value == name:
                node.input[i] = "extra_out"
    shapes = ((channels, 3, 3, 3), (3, channels, 3, 3))
    for i, shape in enumerate(shapes):
        values = (rng.standard_normal(shape) / np.sqrt(9 * shape[1])).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, f"extra{i}"))
    first = helper.make_node("Conv", [name, "extra0"], ["extra_mid"], pads=[1] * 4)
    second = helper.make_node("Conv", ["extra_mid", "extra1"], ["extra_out"], pads=[1] * 4)
    graph.node.insert(0, second)
    graph.node.insert(0, first)
    return grown


def ratio(target: Target, profile: DeviceProfile, files: dict[str, Path], tier: Any) -> Any:
    """Latency of the second model / the first, with its interval."""
    first, second = files
    return measure(target, profile, files, tier).ratio(second, first)


def near_extra(target: Target, profile: DeviceProfile, model: onnx.ModelProto, folder: Path) -> Path:
    """The file of the slower network whose ratio comes nearest to 1.03."""
    tier = profile.final.model_copy(update={"processes": 3})
    found = {}
    for channels in (1, 2, 3, 4, 6, 8, 12, 16):
        path = folder / f"slower-{channels}.onnx"
        onnx.save(slower(model, channels), path)
        value = ratio(target, profile, {"a": folder / "a.onnx", "b": path}, tier).value
        found[path] = abs(value - 1 - EXTRA)
        print(f"\r{channels} more channels: ratio {value:.4f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return min(found, key=lambda path: found[path])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="local")
    arguments.add_argument("--repeats", type=int, default=20)
    arguments.add_argument("--tier", choices=("search", "final"), default="final")
    options = arguments.parse_args()
    torch.manual_seed(0)
    profile = load_profile(options.device)
    target = open_target(profile)
    network = build_network("cifar_resnet20", 10, 3, {}).eval()
    pairs: dict[str, list[Any]] = {"A/A": [], "A/B": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_onnx(network, torch.randn(1, 3, 32, 32), folder / "a.onnx")
        (folder / "copy.onnx").write_bytes((folder / "a.onnx").read_bytes())
        b = near_extra(target, profile, onnx.load(folder / "a.onnx"), folder)
        seconds = {"A/A": folder / "copy.onnx", "A/B": b}
        for i in range(options.repeats):
            for kind, found in pairs.items():
                found.append(ratio(target, profile, {"a": folder / "a.onnx", "b": seconds[kind]}, options.tier))
            print(f"\r{i + 1} of {options.repeats} repeats", end="", file=sys.stderr)
        print(file=sys.stderr)
    target.close()
    rows = [
        {
            "pair": kind,
            "measurements": len(found),
            "median ratio": float(np.median([r.value for r in found])),
            "scatter of ratios %": 100 * float(np.std([np.log(r.value) for r in found])),
            "median half-width %": 100 * float(np.median([r.half_width / r.value for r in found])),
            "interval covers 1": sum(r.low <= 1 <= r.high for r in found),
            "interval above 1": sum(r.low > 1 for r in found),
        }
        for kind, found in pairs.items()
    ]
    coverage = rows[0]["interval covers 1"] / options.repeats
    power = rows[1]["interval above 1"] / options.repeats
    true = rows[1]["median ratio"]
    fair = abs(true - 1 - EXTRA) <= TOLERANCE
    figures = [
        Figure("aa_coverage", coverage, 0.9, coverage >= 0.9),
        Figure("power_3pct", power, 0.8, power >= 0.8 and fair),
        Figure("true_ratio", true, 1 + EXTRA, fair),
    ]
    present(f"A/A and A/B, tier {options.tier}", rows, figures, options.json)


if __name__ == "__main__":
    main()
