"""Predicted against measured latency: at most 15 measurements a network, then 80 plans held out.

    python benchmarks/latency_model.py [--device local] [--plans 40] [--only REGEX] [--json PATH]

ResNet-56 (32 x 32), ResNet-18 and MobileNetV2 (224 x 224), random weights. The model chooses the plans it measures
itself, as in a search. Held out are `--plans` random plans, from a fifth of the channels to nearly all, the widths of
each multiples of 1, 2, 4, 8 or 16; and as many plans of 48 to 52 % of the MACs, of which MACs know nothing. Held-out
plans are measured twice, in random order and longer than a search would, and the geometric mean is the truth; how far
the two lie apart is printed beside it, because no prediction can be better than the truth is known. The line fitted to
the MACs of the model's own measurements is the control.

`left out %` is what the model itself says of its error. `median_error_NET` and `spearman_NET` are of the random plans,
`iso_spearman_NET` is of those of equal MACs.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.device_profiles import BenchmarkResult, Tier, load_profile, measure, open_target
from secateur.export.layers import layer_table
from secateur.export.qdq import Calibration
from secateur.export.quantised import QuantisedTemplate
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.schema import LatencySection
from secateur.pipeline.evaluation.latency import MULTIPLES, Latencies, plan_of
from secateur.pipeline.run.schemes import scheme_of
from secateur.pipeline.workloads.detection.networks import build_detector
from secateur.pipeline.workloads.networks import build_network
from secateur.pruning import PruningPlan
from secateur.pruning.cost import costs
from secateur.pruning.plan import IntArray, SearchSpace

MEASUREMENTS, CALIBRATION = 15, 4
TRUTH = Tier(processes=2, warmup=8, min_repeats=30, min_seconds=0.8)
NETWORKS = {
    "resnet56": ("cifar/resnet56", 10, 32),
    "resnet18": ("resnet18", 1000, 224),
    "mobilenet_v2": ("mobilenet_v2", 1000, 224),
}
OTHERS = {
    "mobilenet_v3_large": ("mobilenet_v3_large", 1000, 224),
    "efficientnet_b0": ("efficientnet_b0", 1000, 224),
    "ssdlite": ("ssdlite320_mobilenet_v3_large", 20, 320),
}
"""Networks of other benchmarks."""


class Network:
    """A network, its groups, its template, and a way to time any of its plans beside the unpruned one in fp32."""

    def __init__(self, name: str, device: str, folder: Path, precision: str = "fp32") -> None:
        torch.manual_seed(0)
        built, classes, size = {**NETWORKS, **OTHERS}[name]
        detector = name == "ssdlite"
        made = build_detector(built, classes, {}) if detector else build_network(built, classes, (3, 32, 32), {})
        self.model: nn.Module = made.eval()
        self.example: Tensor = torch.randn(1, 3, size, size)
        self.graph = trace(self.model, self.example)
        self.template = OnnxTemplate.export(self.model, self.example, self.graph)
        self.table = layer_table(self.template)
        self.full = PruningPlan.full(self.graph.groups)
        self.sizes = np.array([group.size for group in self.graph.groups])
        self.profile = load_profile(device)
        self.target, self.folder, self.count = open_target(self.profile), folder, 0
        self.template.write(self.full, folder / "baseline.onnx")
        self.cut: OnnxTemplate | QuantisedTemplate = self.template
        if precision != "fp32":
            noise = np.random.default_rng(0).standard_normal((CALIBRATION, 3, size, size)).astype(np.float32)
            self.cut = QuantisedTemplate.make(self.template, Calibration(noise, scheme_of([self.profile])))

    def time(self, plan: PruningPlan, tier: Tier | None = None) -> tuple[dict[str, float], BenchmarkResult]:
        """One measurement beside the unpruned network: of the search tier with a profile, or of another tier."""
        self.count += 1
        path = self.folder / "candidate.onnx"
        self.cut.write(plan, path)
        models = {"baseline": self.folder / "baseline.onnx", "candidate": path}
        result = measure(self.target, self.profile, models, tier or "search", nodes=tier is None)
        return {"latency_ratio": result.ratio("candidate", "baseline").value}, result

    def macs(self, widths: IntArray) -> np.ndarray:
        """Shares of the unpruned network's MACs, shape ``(plans,)``."""
        found = costs(self.graph, np.concatenate([widths, self.sizes[None]])).macs.astype(float)
        share: np.ndarray = found[:-1] / found[-1]
        return share

    def random(self, count: int, rng: np.random.Generator) -> IntArray:
        """Random plans; the widths of each are multiples of a number of its own."""
        return np.array(
            [
                self._snap(
                    np.clip(rng.normal(rng.uniform(0.2, 0.95), 0.2, len(self.sizes)), 0.1, 1.0), rng.choice(MULTIPLES)
                )
                for _ in range(count)
            ]
        )

    def equal(self, count: int, rng: np.random.Generator) -> IntArray:
        """Random plans of 48 to 52 % of the MACs."""
        found: list[IntArray] = []
        while len(found) < count:
            multiple, shares = rng.choice(MULTIPLES), np.clip(rng.normal(0.7, 0.2, len(self.sizes)), 0.1, 1.5)
            low, high = 0.1, 2.0
            for _ in range(30):
                middle = (low + high) / 2
                over = self.macs(self._snap(np.clip(shares * middle, 0.05, 1.0), multiple)[None])[0] > 0.5
                low, high = (low, middle) if over else (middle, high)
            widths = self._snap(np.clip(shares * low, 0.05, 1.0), multiple)
            if abs(self.macs(widths[None])[0] - 0.5) <= 0.02:
                found.append(widths)
        return np.array(found)

    def _snap(self, shares: np.ndarray, multiple: int) -> IntArray:
        widths = np.maximum(np.round(shares * self.sizes / multiple) * multiple, np.minimum(multiple, self.sizes))
        snapped: IntArray = np.minimum(widths, self.sizes).astype(np.int64)
        return snapped


def judge(name: str, device: str, plans: int) -> list[dict[str, Any]]:
    """The rows of one network: random plans, and plans of equal MACs."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        network = Network(name, device, Path(folder))
        space = SearchSpace.of(network.graph.groups)
        section = LatencySection(measurements=MEASUREMENTS, max_error=9.0, min_spearman=1e-6)
        latencies = Latencies(lambda: network.table, network.time, Path(folder, "raw.jsonl"), section, space)
        model = latencies.model()
        assert model is not None and model.trust is not None and network.count <= MEASUREMENTS
        own = [latencies.samples[digest] for digest in latencies.samples]
        line = np.polyfit(network.macs(np.array([s.widths for s in own])), [s.ratio for s in own], 1)
        sets = {"random": network.random(plans, rng), "equal MACs": network.equal(plans, rng)}
        every = np.concatenate(list(sets.values()))
        rounds = np.zeros((2, len(every)))
        for row in rounds:
            for i in rng.permutation(len(every)):
                row[i] = network.time(plan_of(network.full, every[i]), TRUTH)[0]["latency_ratio"]
                print(f"\r{name}: {np.count_nonzero(rounds)} of {rounds.size} plans", end="", file=sys.stderr)
        print(file=sys.stderr)
        network.target.close()
    rows = []
    for k, (kind, widths) in enumerate(sets.items()):
        chosen = slice(k * plans, (k + 1) * plans)
        truth, apart = np.sqrt(rounds[0, chosen] * rounds[1, chosen]), rounds[0, chosen] / rounds[1, chosen]
        predicted, by_macs = model.ratios(widths), np.polyval(line, network.macs(widths))
        rows.append(
            {
                "network": name,
                "plans": f"{plans} {kind}",
                "measured": len(own),
                "max / min": truth.max() / truth.min(),
                "error %": 100 * float(np.median(np.abs(predicted / truth - 1))),
                "Spearman": float(spearmanr(predicted, truth).statistic),
                "MACs: error %": 100 * float(np.median(np.abs(by_macs / truth - 1))),
                "MACs: Spearman": float(spearmanr(by_macs, truth).statistic),
                "noise %": 100 * float(np.median(np.abs(apart - 1))),
                "noise: Spearman": float(spearmanr(rounds[0, chosen], rounds[1, chosen]).statistic),
                "left out %": 100 * model.trust.median_error,
            }
        )
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--device", default="local")
    arguments.add_argument("--plans", type=int, default=40)
    arguments.add_argument("--only", default="")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for name in NETWORKS if re.search(options.only, name) for row in judge(name, options.device, options.plans)
    ]
    figures = []
    for row in rows:
        name = row["network"]
        if row["plans"].endswith("random"):
            error = row["error %"] / 100
            figures.append(Figure(f"median_error_{name}", error, 0.05, error <= 0.05))
            figures.append(Figure(f"spearman_{name}", row["Spearman"], 0.97, row["Spearman"] >= 0.97))
        else:
            figures.append(Figure(f"iso_spearman_{name}", row["Spearman"], 0.85, row["Spearman"] >= 0.85))
    present("Latency of plans, predicted from few measurements", rows, figures, options.json)


if __name__ == "__main__":
    main()
