"""Search by measured latency and channel steps, against search by FLOPs alone, and against Torch-Pruning's defaults.

    python benchmarks/latency_search.py [--device local] [--plans 60] [--share 0.5] [--only REGEX] [--json PATH]

MobileNetV2 and ResNet-18 (224 x 224, random weights), half of the MACs. Both searches are the method `optuna` with
`--plans` evaluations, the same seed and the same proxy for accuracy: the share of the filters' L1 norm that is kept,
mean over the channel groups. One may use every width and is rewarded for the proxy and MACs alone; the other is given
the widths that a probe of the device found to pay, and the reward `device` over latencies that a model predicts from at
most 15 measurements. Torch-Pruning prunes by its defaults (magnitude, every layer alike, no rounding of widths), its
ratio bisected to the same MACs. All networks are then timed beside the unpruned one, interleaved, at the final tier.

`NET_gain`: latency of the FLOPs plan over that of ours, at equal MACs. `NET_gain_over_peer`: the same against
Torch-Pruning. `NET_gain_equal_proxy`: ours widened until its proxy reaches that of the FLOPs plan, whatever its MACs.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from benchmarks.latency_model import MEASUREMENTS, Network
from secateur.device_profiles import Multiples, load_profile, measure, open_target
from secateur.device_profiles.latency_model import LatencyModel
from secateur.device_profiles.staircase import probe
from secateur.export import export_onnx
from secateur.pipeline.config.schema import LatencySection
from secateur.pipeline.evaluation.latency import Latencies, widths_of
from secateur.pipeline.run.opening import widths_costs
from secateur.pipeline.run.widths import group_multiples
from secateur.pruning import PruningPlan
from secateur.pruning.cost import cost, count
from secateur.pruning.plan import SearchSpace
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Archive, Evaluate, Evaluation, Goal, Problem, Request, Score
from secateur.pruning.search.reward import make_reward

NETWORKS = ("mobilenet_v2", "resnet18")
BOUNDS = {"mobilenet_v2_gain": 1.5}


class Contest:
    """One network: its proxy, its latency model, and searches on it."""

    def __init__(self, network: Network, share: float, plans: int, folder: Path) -> None:
        self.network, self.share, self.plans, self.folder = network, share, plans, folder
        self.saliency = channel_saliency(network.model, network.graph, "l1", 0)
        self.model: LatencyModel | None = None
        self.dense = self.evaluate(network.full)

    def proxy(self, plan: PruningPlan) -> float:
        """Share of the filters' L1 norm that is kept, mean over groups."""
        return float(np.mean([s[list(plan.kept[n])].sum() / s.sum() for n, s in self.saliency.items()]))

    def macs(self, plan: PruningPlan) -> float:
        return float(self.network.macs(widths_of(plan)[None])[0])

    def evaluate(self, plan: PruningPlan) -> Evaluation:
        metrics = {"top1": self.proxy(plan), "macs": float(cost(self.network.graph, plan).macs), "params": 1.0}
        if self.model is not None:
            metrics["latency_ratio"] = float(self.model.ratios(widths_of(plan)[None])[0])
        return Evaluation(metrics=metrics)

    def answer(self, request: Request) -> Any:
        if isinstance(request, Evaluate):
            return tuple(self.evaluate(candidate.plan) for candidate in request.candidates)
        assert isinstance(request, Score), request
        return self.saliency

    def search(self, space: SearchSpace, preset: str) -> Archive:
        """What the method finds in a space with a reward."""
        problem = Problem(
            space,
            self.dense,
            make_reward(preset, self.dense),
            lambda widths: widths_costs(self.network.graph, space, widths),
            Goal(macs_ratio=self.share),
            np.random.default_rng(0),
        )
        method = METHODS.load("optuna")
        strategy = method.search(problem, method.Options(num_plans=self.plans))
        request = next(strategy)
        while True:
            try:
                request = strategy.send(self.answer(request))
            except StopIteration as end:
                archive: Archive = end.value
                return archive

    def widened(self, space: SearchSpace, archive: Archive, proxy: float) -> PruningPlan:
        """The fastest of the archive's plans, each widened in proportion until its proxy is reached."""
        assert self.model is not None
        found = []
        for entry in archive:
            widths = space.encode(entry.candidate.plan)
            for factor in np.linspace(1.0, 4.0, 301):
                grown = [space.snap(n, w * factor) for n, w in zip(space.names, widths, strict=True)]
                plan = space.decode(grown, self.saliency)
                if self.proxy(plan) >= proxy:
                    found.append(plan)
                    break
        return min(found, key=lambda plan: float(self.model.ratios(widths_of(plan)[None])[0]))

    def file(self, name: str, plan: PruningPlan) -> Path:
        path = self.folder / f"{name}.onnx"
        self.network.template.write(plan, path)
        return path

    def peer(self) -> tuple[Path, float]:
        """Torch-Pruning's network of the same MACs, and its share of them."""
        import torch_pruning as tp

        dense = count(self.network.model, self.network.example).macs

        def pruned(ratio: float) -> torch.nn.Module:
            model = copy.deepcopy(self.network.model)
            last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1:]
            pruner = tp.pruner.MagnitudePruner(
                model,
                self.network.example,
                tp.importance.MagnitudeImportance(),
                pruning_ratio=ratio,
                ignored_layers=last,
            )
            pruner.step()
            return model.eval()

        low, high = 0.0, 0.9
        for _ in range(12):
            middle = (low + high) / 2
            over = count(pruned(middle), self.network.example).macs > self.share * dense
            low, high = (middle, high) if over else (low, middle)
        model = pruned(high)
        path = self.folder / "peer.onnx"
        export_onnx(model, self.network.example, path)
        return path, count(model, self.network.example).macs / dense


def contest(name: str, options: Any, multiples: Multiples) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of one network, and its gains."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        network = Network(name, options.device, folder)
        shapes: Mapping[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in network.model.state_dict().items()}
        every = SearchSpace.of(network.graph.groups, min_keep_ratio=0.1)
        steps = group_multiples(network.graph, shapes, multiples)
        stepped = SearchSpace.of(network.graph.groups, channel_multiple=steps, min_keep_ratio=0.1)
        duel = Contest(network, options.share, options.plans, folder)
        blind = duel.search(every, "rewarded_v2")[0].candidate
        latencies = Latencies(
            lambda: network.table,
            network.time,
            folder / "raw.jsonl",
            LatencySection(measurements=MEASUREMENTS, max_error=9.0, min_spearman=1e-6),
            stepped,
        )
        duel.model = latencies.model()
        duel.dense = duel.evaluate(network.full)
        seeing = duel.search(stepped, "device")
        plans = {"FLOPs alone": blind.plan, "measured, stepped": seeing[0].candidate.plan}
        plans["measured, stepped, equal proxy"] = duel.widened(stepped, seeing, duel.proxy(blind.plan))
        files = {"unpruned": folder / "baseline.onnx"}
        files |= {title: duel.file(f"plan{i}", plan) for i, (title, plan) in enumerate(plans.items())}
        files["Torch-Pruning"], share = duel.peer()
        result = measure(network.target, network.profile, files, "final")
        network.target.close()
    rows = [
        {
            "network": name,
            "plan": title,
            "MACs kept": duel.macs(plans[title]) if title in plans else share,
            "proxy": duel.proxy(plans[title]) if title in plans else float("nan"),
            "latency ratio, 95 %": str(result.ratio(title, "unpruned")),
        }
        for title in (*plans, "Torch-Pruning")
    ]
    ours = "measured, stepped"
    gains = {
        f"{name}_gain": result.ratio("FLOPs alone", ours).value,
        f"{name}_gain_over_peer": result.ratio("Torch-Pruning", ours).value,
        f"{name}_gain_equal_proxy": result.ratio("FLOPs alone", f"{ours}, equal proxy").value,
    }
    return rows, gains


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="local")
    arguments.add_argument("--plans", type=int, default=60)
    arguments.add_argument("--share", type=float, default=0.5)
    arguments.add_argument("--only", default="")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    profile = load_profile(options.device)
    target = open_target(profile)
    multiples = probe(target, profile, seconds=60).multiples
    target.close()
    rows: list[dict[str, Any]] = []
    gains: dict[str, float] = {}
    for name in NETWORKS:
        if re.search(options.only, name):
            more, found = contest(name, options, multiples)
            rows += more
            gains |= found
    figures = [Figure(n, value, BOUNDS.get(n, 1.0), value >= BOUNDS.get(n, 1.0)) for n, value in gains.items()]
    print(f"widths are multiples of {multiples}")
    present(f"Latency at {options.share:.0%} of the MACs", rows, figures, options.json)


if __name__ == "__main__":
    main()
