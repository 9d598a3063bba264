"""Search by measured latency against uniform plans of every multiple, search by FLOPs alone, and Torch-Pruning.

    python benchmarks/latency_search.py [--device local] [--plans 60] [--share 0.5] [--only REGEX] [--keep FOLDER]
                                        [--json PATH]

MobileNetV2, MobileNetV3-Large, EfficientNet-B0, ResNet-18, ResNet-56 and SSDlite with random weights, half of the MACs.
First the device is probed with the network, as a run does; the table says which processor that was. `uniform, m`
keeps the same share of every group by L1 norms, all widths in multiples of m; `uniform, probed` in those of the probe.
Both searches are the method `optuna` with `--plans` evaluations, the same seed and the same proxy for accuracy: the
share of the filters' L1 norm that is kept, mean over the channel groups. `FLOPs alone` may use every width and is
rewarded for the proxy and MACs; `measured` has the probed widths, begins with the best uniform plan, and is rewarded by
`device` over latencies that a model predicts from at most 15 measurements. Torch-Pruning prunes by its defaults
(magnitude, every layer alike, no rounding of widths), its ratio bisected to the same MACs. All networks are then timed
beside the unpruned one, interleaved, at the final tier.

`probe_regret_NET`: latency of `uniform, probed` over the best of all uniform plans. `search_over_uniform_NET`: latency
of the best uniform plan over that of our search at the proxy of that plan. `NET_gain`: latency of the FLOPs plan over
that of ours, at equal MACs; `NET_gain_over_peer`: the same against Torch-Pruning; `NET_gain_equal_proxy`: the same with
ours at the proxy of the FLOPs plan, whatever its MACs.

With `--keep` each network's rows are kept in a file of that folder, so that a run that was ended goes on, and networks
can be run one by one with `--only`. What was kept on another processor or under other options is measured anew.
"""

from __future__ import annotations

import copy
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from benchmarks.latency_model import MEASUREMENTS, Network
from secateur.device_profiles import load_profile, measure, open_target
from secateur.device_profiles.latency_model import LatencyModel
from secateur.device_profiles.network_probe import MULTIPLES
from secateur.export import export_onnx
from secateur.pipeline.config.schema import LatencySection
from secateur.pipeline.devices.fleet import Device
from secateur.pipeline.evaluation.latency import Latencies, widths_of
from secateur.pipeline.run.network_probe import Cuts, Settled, probe_network
from secateur.pipeline.run.opening import widths_costs
from secateur.pruning import PruningPlan
from secateur.pruning.cost import cost, count
from secateur.pruning.plan import SearchSpace
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.search import METHODS
from secateur.pruning.search.beginning import from_uniform
from secateur.pruning.search.landing import filled
from secateur.pruning.search.protocol import Archive, Evaluate, Evaluation, Goal, Problem, Request, Score, Time
from secateur.pruning.search.reward import make_reward
from secateur.pruning.search.support import Limit, SearchError, macs_ratios

NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet56", "ssdlite")
PEERS = ("mobilenet_v2", "resnet18")
"""Networks that Torch-Pruning is asked for too."""
LEAST = {"mobilenet_v2_gain": 1.5, "resnet18_gain": 1.2, "search_over_uniform_median": 1.1}
MOST_REGRET = 1.03
LEAST_KEPT = 0.1
TRIED = 5
"""Plans of our search, the fastest by prediction, that are measured to choose among them."""
OURS, BLIND, PROBED, PEER = "measured", "FLOPs alone", "uniform, probed", "Torch-Pruning"


class Contest:
    """One network: its proxy, its latency model, and searches on it."""

    def __init__(self, network: Network, share: float, plans: int, folder: Path) -> None:
        self.network, self.share, self.plans, self.folder = network, share, plans, folder
        self.saliency = channel_saliency(network.model, network.graph, "l1", 0)
        self.model: LatencyModel | None = None
        self.sees_latency = False
        self.measured: dict[str, float] = {}
        self.dense = self.evaluate(network.full)

    def proxy(self, plan: PruningPlan) -> float:
        """Share of the filters' L1 norm that is kept, mean over groups."""
        return float(np.mean([s[list(plan.kept[n])].sum() / s.sum() for n, s in self.saliency.items()]))

    def macs(self, plan: PruningPlan) -> float:
        return float(self.network.macs(widths_of(plan)[None])[0])

    def predicted(self, plan: PruningPlan) -> float:
        """Latency ratio by the model; measured where there is none, as a run does it."""
        if self.model is None:
            return self.time(plan)
        return float(self.model.ratios(widths_of(plan)[None])[0])

    def time(self, plan: PruningPlan) -> float:
        """Measured latency ratio, once a plan."""
        if plan.digest not in self.measured:
            self.measured[plan.digest] = self.network.time(plan)[0]["latency_ratio"]
        return self.measured[plan.digest]

    def evaluate(self, plan: PruningPlan) -> Evaluation:
        metrics = {"top1": self.proxy(plan), "macs": float(cost(self.network.graph, plan).macs), "params": 1.0}
        if self.sees_latency:
            known = self.measured.get(plan.digest)
            metrics["latency_ratio"] = self.predicted(plan) if known is None else known
        return Evaluation(metrics=metrics)

    def answer(self, request: Request) -> Any:
        if isinstance(request, Evaluate):
            return tuple(self.evaluate(candidate.plan) for candidate in request.candidates)
        if isinstance(request, Time):
            return np.array([self.time(plan) for plan in request.plans])
        assert isinstance(request, Score), request
        return self.saliency

    def problem(self, space: SearchSpace, preset: str) -> Problem:
        return Problem(
            space,
            self.dense,
            make_reward(preset, self.dense),
            lambda widths: widths_costs(self.network.graph, space, widths),
            Goal(macs_ratio=self.share),
            np.random.default_rng(0),
        )

    def uniform(self, space: SearchSpace) -> PruningPlan | None:
        """The same share of every group, at the MACs of the contest; None where so few cannot be reached."""
        problem = self.problem(space, "rewarded_v2")
        try:
            plan = filled(problem, Limit("macs_ratio", macs_ratios(problem), self.share), self.saliency)
        except SearchError:
            return None
        return plan if self.macs(plan) <= self.share else None

    def search(self, space: SearchSpace, preset: str, multiples: tuple[int, ...] = ()) -> Archive:
        """What the method finds in a space with a reward."""
        method = METHODS.load("optuna")
        options = method.Options(num_plans=self.plans)
        problem = replace(self.problem(space, preset), multiples=multiples)
        strategy = from_uniform(problem, lambda problem: method.search(problem, options))
        request = next(strategy)
        while True:
            try:
                request = strategy.send(self.answer(request))
            except StopIteration as end:
                archive: Archive = end.value
                return archive

    def at_proxy(self, space: SearchSpace, archive: Archive, proxy: float) -> PruningPlan:
        """The fastest of the archive's plans, each scaled until its proxy is reached: measured, the best predicted."""
        found: dict[str, PruningPlan] = {}
        for entry in archive:
            widths = space.encode(entry.candidate.plan)
            for factor in np.linspace(0.5, 4.0, 351):
                grown = [space.snap(n, w * factor) for n, w in zip(space.names, widths, strict=True)]
                plan = space.decode(grown, self.saliency)
                if self.proxy(plan) >= proxy - 1e-9:
                    found[plan.digest] = plan
                    break
        likely = sorted(found.values(), key=self.predicted)[:TRIED]
        uniform = [entry.candidate.plan for entry in archive if entry.candidate.origin == "uniform"]
        return min([*likely, *(plan for plan in uniform if self.proxy(plan) >= proxy - 1e-9)], key=self.time)

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


def contest(name: str, options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of one network, and its figures."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        network = Network(name, options.device, folder)
        told = lambda done, total, note="": print(f"{name}: {note}", file=sys.stderr)  # noqa: E731
        device = Device(network.profile, network.target)
        found = probe_network(device, network.template, Cuts(network.graph), "", told)
        assert found is not None, "a network that can be cut in one way only"
        groups = network.graph.groups
        every = SearchSpace.of(groups, min_keep_ratio=LEAST_KEPT)
        stepped = SearchSpace.of(groups, channel_multiple=found.of_groups, min_keep_ratio=LEAST_KEPT)
        duel = Contest(network, options.share, options.plans, folder)
        plans = uniforms(duel)
        probed = duel.uniform(stepped)
        assert plans and probed is not None, "a share of the MACs that uniform plans reach"
        plans[PROBED] = probed
        best = min((title for title in plans if title != PROBED), key=lambda title: duel.time(plans[title]))
        plans[BLIND] = duel.search(every, "rewarded_v2")[0].candidate.plan
        settings = LatencySection(measurements=MEASUREMENTS, max_error=9.0, min_spearman=1e-6)
        latencies = Latencies(lambda: network.table, network.time, folder / "raw.jsonl", settings, stepped)
        duel.model, duel.sees_latency = latencies.model(), True
        duel.dense = duel.evaluate(network.full)
        seeing = duel.search(stepped, "device", Settled({name: found}, {}, found.of_groups).best)
        plans[OURS] = seeing[0].candidate.plan
        for other in (best, BLIND):
            plans[f"{OURS}, proxy of {other}"] = duel.at_proxy(stepped, seeing, duel.proxy(plans[other]))
        files = {"unpruned": folder / "baseline.onnx"}
        files |= {plan.digest: duel.file(plan.digest, plan) for plan in plans.values() if not plan.is_full}
        timed = {title: "unpruned" if plan.is_full else plan.digest for title, plan in plans.items()}
        shares = {title: duel.macs(plan) for title, plan in plans.items()}
        if name in PEERS:
            files[PEER], shares[PEER] = duel.peer()
            timed[PEER] = PEER
        result = measure(network.target, network.profile, files, "final")
        network.target.close()
    rows = [
        {
            "network": name,
            "plan": title,
            "MACs kept": share,
            "proxy": duel.proxy(plans[title]) if title in plans else float("nan"),
            "latency ratio, 95 %": str(result.ratio(timed[title], "unpruned")),
        }
        for title, share in shares.items()
    ]
    latency = {title: result.ratio(timed[title], "unpruned").value for title in shares}
    fastest = min(latency[title] for title in latency if title.startswith("uniform"))
    figures = {
        f"probe_regret_{name}": latency[PROBED] / fastest,
        f"search_over_uniform_{name}": latency[best] / latency[f"{OURS}, proxy of {best}"],
        f"{name}_gain": latency[BLIND] / latency[OURS],
        f"{name}_gain_equal_proxy": latency[BLIND] / latency[f"{OURS}, proxy of {BLIND}"],
    }
    rows.insert(0, {**dict.fromkeys(rows[0], ""), "network": name, "plan": f"probed: {found.text}"})
    return rows, figures | ({f"{name}_gain_over_peer": latency[PEER] / latency[OURS]} if PEER in latency else {})


def uniforms(duel: Contest) -> dict[str, PruningPlan]:
    """The uniform plan of every multiple; those that are the same as a smaller one's are left out."""
    found: dict[str, PruningPlan] = {}
    for multiple in MULTIPLES:
        space = SearchSpace.of(duel.network.graph.groups, channel_multiple=multiple, min_keep_ratio=LEAST_KEPT)
        plan = duel.uniform(space)
        if plan is not None and plan.digest not in {known.digest for known in found.values()}:
            found[f"uniform, {multiple}"] = plan
    return found


def figure(name: str, value: float) -> Figure:
    """A figure with its bound."""
    if name.startswith("probe_regret"):
        return Figure(name, value, MOST_REGRET, value <= MOST_REGRET)
    bound = LEAST.get(name, 1.0)
    return Figure(name, value, bound, value >= bound)


def figures_of(found: Mapping[str, float]) -> list[Figure]:
    """All figures, and the median of what the search wins over uniform plans."""
    over = [value for name, value in found.items() if name.startswith("search_over_uniform_")]
    median = {"search_over_uniform_median": statistics.median(over)}
    return [figure(name, value) for name, value in {**found, **median}.items()]


def kept(file: Path | None, asked: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]] | None:
    """The rows and figures of an earlier run under the same options on the same processor."""
    if file is None or not file.is_file():
        return None
    data = json.loads(file.read_text())
    return (data["rows"], data["figures"]) if data["asked"] == asked else None


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="local")
    made.add_argument("--plans", type=int, default=60)
    made.add_argument("--share", type=float, default=0.5)
    made.add_argument("--only", default="")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each network's rows there, and go on from them")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    target = open_target(load_profile(options.device))
    device = target.prepare()["device"]
    target.close()
    processor = f"{device.get('cpu')}, {device.get('cpus')} cores"
    asked = {"processor": processor, "device": options.device, "plans": options.plans, "share": options.share}
    rows: list[dict[str, Any]] = []
    found: dict[str, float] = {}
    for name in NETWORKS:
        if not re.search(options.only, name):
            continue
        file = None if options.keep is None else options.keep / f"{name}.json"
        known = kept(file, asked)
        more, figures = known or contest(name, options)
        if file is not None and known is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"asked": asked, "rows": more, "figures": figures}, indent=1) + "\n")
        rows += more
        found |= figures
    present(f"Latency at {options.share:.0%} of the MACs on {processor}", rows, figures_of(found), options.json)


if __name__ == "__main__":
    main()
