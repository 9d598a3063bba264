"""What one template saves: cut it to a plan and open the file, against exporting the pruned network and opening that.

    python benchmarks/slicing.py [--plans 3] [--only REGEX] [--json PATH]

Random weights, random plans (every group keeps 40 to 90 % of its channels), one thread. For each plan both roads run in
turn in the same process, each from the pruned network in memory to an ONNX Runtime session on a file of its own: the
template is cut with the pruned network's weights, or that network goes through `torch.onnx`. Making the template (once
per run), surgery and the comparison of outputs are not in the times. SSDlite goes without its post-processing (boxes
are chosen by the data, which `torch.onnx` cannot export): feature maps and raw head outputs.

`slice_speedup` is the smallest ratio among the networks; the ratio of a network is the sum of its seconds of export and
open over the sum of its seconds of slice and open. `slice_error` is the largest relative difference between a cut file
under ONNX Runtime and the pruned network in PyTorch, over all plans and outputs.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from benchmarks._zoo import build
from secateur.export import export_onnx, open_session, verify_parity
from secateur.export.slicing import OnnxTemplate
from secateur.pruning import ChannelGraph, PruningPlan, prune

SPEEDUP, ERROR = 20.0, 1e-5
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "ssdlite320_mobilenet_v3_large")


class RawDetector(nn.Module):
    """A detector of torchvision without anchors and choice of boxes: images ``(n, 3, h, w)`` -> outputs of its head."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return outputs


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and one image of shape ``(1, 3, h, w)``."""
    model, (example,) = build("torchvision", name)
    if isinstance(example, list):
        return RawDetector(model).eval(), example[0][None]
    return model, example


def random_plan(graph: ChannelGraph, rng: np.random.Generator) -> PruningPlan:
    """Every group keeps a random share of random channels."""
    masks = {}
    for group in graph.groups:
        width = max(1, round(group.size * rng.uniform(0.4, 0.9)))
        masks[group.name] = np.isin(np.arange(group.size), rng.permutation(group.size)[:width])
    return PruningPlan.from_masks(masks)


def both(
    template: OnnxTemplate, plan: PruningPlan, pruned: nn.Module, example: Tensor, cut: Path, exported: Path
) -> list[float]:
    """Seconds of slice, open, export, open."""
    steps: tuple[Callable[[], Any], ...] = (
        lambda: template.write(plan, cut, pruned.state_dict()),
        lambda: open_session(cut),
        lambda: export_onnx(pruned, example, exported),
        lambda: open_session(exported),
    )
    times = []
    for step in steps:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return times


def measure(name: str, plans: int, folder: Path) -> dict[str, Any]:
    """One row; the first plan only warms up."""
    model, example = network(name)
    graph = trace(model, example)
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    template = OnnxTemplate.export(model, example, graph)
    template_s = time.perf_counter() - started
    times, errors = [], []
    for i in range(1 + plans):
        plan = random_plan(graph, rng)
        pruned = prune(model, graph, plan)
        cut, exported = folder / f"cut-{i}.onnx", folder / f"exported-{i}.onnx"  # new names, as in a search
        times.append(both(template, plan, pruned, example, cut, exported))
        errors.append(verify_parity(cut, pruned, [example], ERROR).max_relative_error)
        cut.unlink()
        exported.unlink()
    slice_s, open_s, export_s, open_exported_s = np.mean(times[1:], axis=0).tolist()
    return {
        "network": name,
        "groups": len(graph.groups),
        "template_s": template_s,
        "slice_s": slice_s,
        "open_s": open_s,
        "export_s": export_s,
        "open_exported_s": open_exported_s,
        "speedup": (export_s + open_exported_s) / (slice_s + open_s),
        "error": max(errors),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plans", type=int, default=3, help="random plans per network (default 3)")
    arguments.add_argument("--only", default="", metavar="REGEX", help="networks to run")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(n, options.plans, Path(folder)) for n in NETWORKS if re.search(options.only, n)]
    speedup, error = min(r["speedup"] for r in rows), max(r["error"] for r in rows)
    figures = [
        Figure("slice_speedup", speedup, SPEEDUP, speedup >= SPEEDUP),
        Figure("slice_error", error, ERROR, error <= ERROR),
    ]
    present(f"cut and open, or export and open; torch {torch.__version__}, one thread", rows, figures, options.json)


if __name__ == "__main__":
    main()
