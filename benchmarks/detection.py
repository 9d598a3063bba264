"""Is a compact detector as good as its baseline, after equal fine-tuning of both? With controls at the same MACs.

    SECATEUR_DATA=... python benchmarks/detection.py [--run DIRECTORY] [--controls uniform,random,scratch] [--json PATH]

Takes a finished run (by default it performs ``pipeline/runs/bccd-ssd300.yaml`` first) and trains, from the run's own
baseline, by its ``finetune`` recipe and with the same teacher: the unpruned network, the plan of ``uniform`` with L1
saliency, a random plan, and, from random weights, the compact network. Everything is exported; metrics come from the
ONNX files on the test split, which nothing before has read. Differences in mAP have a bootstrap interval over the test
images, paired; latencies are of one interleaved measurement at the final tier. The registered version is pulled back,
and what it finds on the test images compared with PyTorch. Controls that are trained already are not trained again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.device_profiles import measure
from secateur.export.onnx_export import export_onnx
from secateur.export.verify import predict
from secateur.pipeline.progress import RichProgress
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import first_batch, load_baseline, load_compact
from secateur.pipeline.surroundings import home
from secateur.pipeline.terminal import Terminal
from secateur.pipeline.training.checkpoints import load_weights, save_weights
from secateur.pipeline.training.loop import fit
from secateur.pipeline.workloads.detection import judged
from secateur.pipeline.workloads.detection.boxes import average_precision
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.surgery import prune

RUN_FILE = Path(__file__).parents[1] / "pipeline" / "runs" / "bccd-ssd300.yaml"
RESAMPLES = 500


def main() -> None:
    """Train the controls, compare, print."""
    made = parser(__doc__)
    made.add_argument("--run", type=Path, metavar="DIRECTORY", help="a finished detection run")
    made.add_argument("--controls", default="uniform,random", metavar="NAMES", help="of uniform, random, scratch")
    arguments = made.parse_args()
    with Run(arguments.run or _performed(), RichProgress(Terminal(stderr=True))) as run:
        model, graph = load_baseline(run)
        plan = PruningPlan.from_json((run.directory / "compact.plan.json").read_text(encoding="utf-8"))
        compact = load_compact(run, model, graph, plan)
        networks = {
            "baseline": (PruningPlan.full(graph.groups), model),
            "compact": (plan, compact),
            "baseline, tuned equally": _tuned(run, "baseline", PruningPlan.full(graph.groups), model, graph),
        }
        space, macs = run.space(graph), cost(graph, plan).macs
        torch.manual_seed(run.config.seed)  # of random weights
        for name in filter(None, arguments.controls.split(",")):
            chosen = plan if name == "scratch" else CONTROLS[name](model, graph, space, macs, run.config.seed)
            start = run.workload.fresh_model() if name == "scratch" else model
            networks[name] = _tuned(run, name, chosen, start, graph)
        rows, figures = _compared(run, graph, networks)
        figures += _pulled(run, compact)
    present(f"{run.config.name} on {run.profile.name}", rows, figures, arguments.json)


def _performed() -> Path:
    """The run directory of the default run file; the run is performed if it never was."""
    name = RUN_FILE.stem
    finished = sorted((home() / "runs").glob(f"{name}-*/report.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        subprocess.run([sys.executable, "-m", "secateur", "run", str(RUN_FILE)], check=False)
        finished = sorted((home() / "runs").glob(f"{name}-*/report.json"))
    if not finished:
        sys.exit(f"{RUN_FILE.name} did not finish; see above")
    return finished[-1].parent


def _uniform(model: nn.Module, graph: ChannelGraph, space: SearchSpace, macs: int, seed: int) -> PruningPlan:
    """The largest plan with one keep ratio everywhere within the MACs; the channels with the largest L1 norm stay."""
    saliency = channel_saliency(model, graph, "l1", seed)
    plans = [
        space.decode([space.snap(name, ratio * space.sizes[name]) for name in space.names], saliency)
        for ratio in np.linspace(0.05, 1, 96)
    ]
    return [plan for plan in plans if cost(graph, plan).macs <= macs][-1]


def _random(model: nn.Module, graph: ChannelGraph, space: SearchSpace, macs: int, seed: int) -> PruningPlan:
    """Random widths within the MACs, and no more than 5 % below them; random channels stay."""
    rng = np.random.default_rng(seed)
    saliency = {name: rng.random(space.sizes[name]) for name in space.names}
    while True:
        widths = [space.snap(name, rng.uniform(0.2, 1) * space.sizes[name]) for name in space.names]
        plan = space.decode(widths, saliency)
        if 0.95 * macs <= cost(graph, plan).macs <= macs:
            return plan


CONTROLS: Mapping[str, Callable[[nn.Module, ChannelGraph, SearchSpace, int, int], PruningPlan]] = {
    "uniform": _uniform,
    "random": _random,
}


def _tuned(
    run: Run, name: str, plan: PruningPlan, start: nn.Module, graph: ChannelGraph
) -> tuple[PruningPlan, nn.Module]:
    """The plan cut from ``start`` and fine-tuned as the run's compact network was."""
    network, file = prune(start, graph, plan), run.directory / "controls" / f"{name}.safetensors"
    if file.exists():
        network.load_state_dict(load_weights(file))
        return plan, network.eval()
    recipe, teacher = run.config.finetune, load_baseline(run)[0]
    with run.progress.stage(f"Fine-tune {name}") as report:
        fit(
            network,
            run.workload,
            run.workload.train,
            recipe,
            seed=run.config.seed,
            checkpoint=file.with_suffix(".ckpt"),
            compute=run.compute,
            teacher=teacher if recipe.distill else None,
            distill=recipe.distill,
            report=report,
        )
    save_weights(file, network.state_dict())
    return plan, network.cpu()


def _compared(
    run: Run, graph: ChannelGraph, networks: Mapping[str, tuple[PruningPlan, nn.Module]]
) -> tuple[list[dict[str, Any]], list[Figure]]:
    """Rows of the table, and what issue and readers ask of the compact network."""
    files, answers = {}, {}
    example, (images, targets) = run.workload.example_input(), first_batch(run, run.workload.test)
    for name, (_, network) in networks.items():
        files[name] = run.directory / "controls" / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
        export_onnx(network, example, files[name])
        outputs = [torch.from_numpy(predict(files[name], part.numpy(), threads=2)) for part in torch.split(images, 16)]
        pairs = zip(outputs, torch.split(targets, 16), strict=True)
        answers[name] = torch.cat([run.workload.answers(*pair) for pair in pairs])
    result = measure(run.target, run.profile, files, "final", noise_floor=run.device_facts.noise_floor)
    base = "baseline, tuned equally"
    drawn = _resampled(run, answers, targets)
    dense = cost(graph, PruningPlan.full(graph.groups)).macs
    rows = []
    for name, (plan, _) in networks.items():
        found = run.workload.test_metrics(answers[name], targets)
        low, high = np.quantile(drawn[name] - drawn[base], [0.025, 0.975])
        speedup = result.speedup(name, "baseline")
        rows.append(
            {
                "network": name,
                "MACs": f"{cost(graph, plan).macs / dense - 1:+.1%}",
                "mAP50": f"{found['map50']:.4f}",
                "COCO mAP": f"{found['map']:.4f}",
                "mAP50 - tuned baseline (95 %)": f"{low:+.4f} .. {high:+.4f}",
                "p50 ms": f"{result.p50_ms(name):.2f}",
                "speed-up (95 %)": f"{speedup.value:.2f} ({speedup.low:.2f} .. {speedup.high:.2f})",
            }
        )
    by_name = {row["network"]: float(row["mAP50"]) for row in rows}
    drop = by_name[base] - by_name["compact"]
    removed = 1 - cost(graph, networks["compact"][0]).macs / dense
    speedup = result.speedup("compact", "baseline")
    figures = [
        Figure("macs_removed", removed, 0.5, removed >= 0.5),
        Figure("map50_drop", drop, 0.01, drop <= 0.01),
        Figure("speedup_low", speedup.low, 1.0, speedup.low > 1),
    ]
    if "uniform" in by_name:
        gain = by_name["compact"] - by_name["uniform"]
        figures.append(Figure("map50_over_uniform", gain, 0.0, gain >= 0))
    return rows, figures


def _pulled(run: Run, compact: nn.Module) -> list[Figure]:
    """Detections of the registered file, fetched from the registry, against those of the PyTorch model."""
    versions = run.tracker.registry.versions(run.config.tracking.registered_model or run.config.name)
    registered = next(version for version in versions if version.run == run.run_id)
    mlflow.set_tracking_uri(run.tracker.uri)
    file = Path(mlflow.artifacts.download_artifacts(f"{registered.uri}/model.onnx"))
    images, after = first_batch(run, run.workload.test)[0], run.workload.postprocessing
    assert after is not None
    with torch.inference_mode():
        expected = torch.cat([after.apply(compact(part)) for part in torch.split(images, 16)])
    agreement = after.compare(torch.from_numpy(predict(file, images.numpy(), threads=2)), expected)
    return [
        Figure("pulled_detections_compared", agreement.compared, 1, agreement.compared > 0),
        Figure("pulled_detections_that_differ", agreement.differing, 0, agreement.ok),
        Figure("pulled_largest_difference", agreement.largest_error, 1e-3, agreement.largest_error <= 1e-3),
    ]


def _resampled(run: Run, answers: Mapping[str, Tensor], targets: Tensor) -> dict[str, np.ndarray]:
    """mAP50 of each network on bootstrap samples of the test images, the same samples for all."""
    rng = np.random.default_rng(0)
    samples = [torch.from_numpy(rng.integers(0, len(targets), len(targets))) for _ in range(RESAMPLES)]
    curve = run.config.workload.get("metrics", {}).get("curve", "voc07")
    return {
        name: np.array([average_precision(*judged(found[i], targets[i]), curve=curve).mean for i in samples])
        for name, found in answers.items()
    }


if __name__ == "__main__":
    main()
