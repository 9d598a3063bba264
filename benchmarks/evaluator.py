"""Candidates per second of the evaluator against the straightforward loop, on ResNet-56 and CIFAR-10.

    SECATEUR_DATA=... python benchmarks/evaluator.py [--images 1000] [--generations 10] [--plans 4] [--threads 1]
                                                     [--json PATH]

The straightforward loop is what a user of Torch-Pruning writes: a deep copy, a dependency graph, the same channels
pruned, and the copy run in PyTorch on batches of 250. Both get the same plans and the same images, in turn in one
process, and must find the same accuracy; neither takes batch-norm statistics anew, which the loop does not know of.
With one thread the times are CPU times, otherwise wall times. (SECATEUR_DATA is the folder of
pipeline/runs/cifar10-resnet20.yaml, with the weights of ResNet-56.)

`ccep_speedup`: the evolutionary search of CCEP itself, in five groups from the first block to the last, with the
authors' population and generations: seconds of the loop for all its distinct plans (a sample is timed) over our
seconds for all of them, cutting the network and giving up hopeless individuals included. Choosing the fastest way is
shared by all groups of one round.
`plan_speedup`: plans over all groups, each keeping 40 to 90 % of its channels, with the same share of that choice.

`limit_s` is the physical limit without giving up early: the multiplications that the candidates need (for one group:
from its readers on), over what this machine does in a large matrix product in the same run, in the type that the
evaluator has chosen (bfloat16 where the hardware multiplies it natively). `times_limit` is ours over that; a row is
good that is as fast as asked, or takes at most 1.5 times its limit.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from benchmarks.methods import RUN
from secateur.device_profiles.profile import load_profile
from secateur.device_profiles.target import open_target
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import make_evaluator
from secateur.pipeline.run.opening import open_workload
from secateur.pruning import PruningPlan
from secateur.pruning.cost import cost
from secateur.pruning.plan import SearchSpace
from secateur.pruning.search.group_evolution import Settings, Subproblem, evolve
from secateur.pruning.search.protocol import Candidate, Evaluate, Evaluation, Goal, Problem
from secateur.pruning.trace import trace

CCEP_SPEEDUP, PLAN_SPEEDUP = 10.0, 6.0
TIMES_LIMIT = 1.5
BATCH = 250
MATRIX = 2048
NETWORK = (
    "workload.model.name=cifar/resnet56",
    "workload.model.weights=cifar10/resnet56_cifar10.safetensors",
    "search.method=ccep",
    "search.target.macs_ratio=0.5",
    "search.recalibrate_images=0",
)


def straightforward(model: nn.Module, plan: PruningPlan, batches: list[Tensor]) -> Tensor:
    pruned = copy.deepcopy(model)
    dependencies = tp.DependencyGraph().build_dependency(pruned, example_inputs=batches[0][:1])
    for name, kept in plan.kept.items():
        if removed := sorted(set(range(plan.sizes[name])) - set(kept)):
            layer = pruned.get_submodule(name)
            dependencies.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=removed).prune()
    with torch.inference_mode():
        return torch.cat([pruned(images) for images in batches])


def macs_after(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Per convolution and linear layer, the multiplications of all layers that run after it, for one image."""
    done: list[tuple[str, int]] = []

    def count(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, _, out: done.append((name, out.numel() * layer.get_parameter("weight")[0].numel()))

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers]
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    return {name: sum(macs for _, macs in done[i + 1 :]) for i, (name, _) in enumerate(done)}


class Comparison:
    """Both evaluators on the same network and images."""

    def __init__(self, images: int, threads: int, folder: Path) -> None:
        torch.set_num_threads(threads)
        config, profile = (
            parse_run_file(RUN, "evaluator", [*NETWORK, f"search.images={images}"]),
            load_profile("local"),
        )
        workload = open_workload(config)
        self.model, self.images = workload.build_model(), images
        self.graph = trace(self.model, workload.example_input())
        self.space = SearchSpace.of(self.graph.groups, channel_multiple=1, min_keep_ratio=0.1)
        baseline, fleet = Baseline(self.model, self.graph, workload), Fleet([Device(profile, open_target(profile))])
        self.oracle = make_evaluator(baseline, fleet, folder, config.search, config.finetune)
        self.clock = time.process_time if threads == 1 else time.perf_counter
        split, whole = self.oracle.accuracy.split, torch.arange(images)
        load = workload.batch
        self.batches = [
            load(split, part, train=False, generator=None, device=torch.device("cpu")) for part in whole.split(BATCH)
        ]
        self.batches = [(images.contiguous(), labels) for images, labels in self.batches]
        self.ids = count()
        self.rate = 0.0

    def timed(self, action: Callable[[], Any]) -> tuple[float, Any]:
        started = self.clock()
        result = action()
        return self.clock() - started, result

    @property
    def used(self) -> torch.dtype:
        """The type that the evaluator multiplies in."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.oracle.accuracy.inference.precision]

    def measure_rate(self) -> None:
        """Multiplications per second of a large matrix product, in the type that is used: the best seen in this run."""
        a, b = torch.randn(2, MATRIX, MATRIX).to(self.used)
        self.rate = max(self.rate, *(MATRIX**3 / self.timed(lambda: a @ b)[0] for _ in range(3)))

    def loop(self, plan: PruningPlan) -> tuple[float, float]:
        """Seconds and accuracy of the straightforward loop."""
        seconds, outputs = self.timed(lambda: straightforward(self.model, plan, [images for images, _ in self.batches]))
        labels = torch.cat([labels for _, labels in self.batches])
        return seconds, float((outputs.argmax(1) == labels).float().mean())

    def ours(self, candidate: Candidate, floor: float | None = None) -> tuple[float, Evaluation]:
        return self.timed(lambda: self.oracle.evaluate(candidate, False, floor))

    def plan(self, plan: PruningPlan) -> tuple[float, Evaluation]:
        return self.ours(Candidate(next(self.ids), plan, "x"))

    def evolve(self, name: str, generations: int) -> tuple[float, list[tuple[Candidate, Evaluation]]]:
        """Our seconds for the search of one group, and what it asked for."""
        space, full = self.space, self.space.full
        snapshot = Candidate(next(self.ids), full, "snapshot")
        seconds, whole = self.ours(snapshot)
        problem = Problem(space, whole, lambda e: e["top1"], lambda w: {}, Goal(), np.random.default_rng(0))
        settings = Settings(generations=generations, survival="accuracy", fitness="top1")
        search = evolve(problem, settings, self.ids, Subproblem.of(space, snapshot, name, 0.9), whole["top1"])
        asked: list[tuple[Candidate, Evaluation]] = []
        try:
            request = next(search)
            while True:
                assert isinstance(request, Evaluate)
                answers = []
                for candidate in request.candidates:
                    spent, evaluation = self.ours(candidate, request.floor)
                    seconds += spent
                    answers.append(evaluation)
                    asked.append((candidate, evaluation))
                request = search.send(tuple(answers))
        except StopIteration:
            return seconds, asked


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=1000, help="images per candidate (default 1000)")
    arguments.add_argument("--generations", type=int, default=10, help="of CCEP in each group (default 10)")
    arguments.add_argument("--plans", type=int, default=4, help="plans over all groups (default 4)")
    arguments.add_argument("--threads", type=int, default=1, help="threads of both (default 1)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Comparison(options.images, options.threads, Path(folder)), options)


def compare(both: Comparison, options: Any) -> None:
    full, rng = both.space.full, np.random.default_rng(0)
    inner = [name for name in both.space.names if name.endswith(".conv1")]
    after = macs_after(both.model, both.batches[0][0][:1])
    both.oracle.accuracy.inference._patience_s = 0.0
    first_s, _ = both.plan(full)
    shared_s = first_s / len(inner)
    rows: list[dict[str, Any]] = []
    differing = 0

    def row(what: str, num_plans: int, loop_s: float, ours_s: float, macs: float, given_up: int) -> None:
        both.measure_rate()
        cells = {"candidates": what, "plans": num_plans, "given_up": given_up, "loop_s": loop_s, "ours_s": ours_s}
        rows.append({**cells, "speedup": loop_s / ours_s, "gmacs": num_plans * macs * both.images / 1e9})

    for i in np.linspace(0, len(inner) - 1, 5).round().astype(int):
        ours_s, asked = both.evolve(inner[i], options.generations)
        evaluated = [(c, e) for c, e in asked if e.status == "ok"]
        sample = [both.loop(candidate.plan) for candidate, _ in evaluated[:3]]
        differing += sum(a != e["top1"] for (_, a), (_, e) in zip(sample, evaluated, strict=False))
        loop_s = len(asked) * float(np.mean([seconds for seconds, _ in sample]))
        row(inner[i], len(asked), loop_s, ours_s + shared_s, after[inner[i]], len(asked) - len(evaluated))
    groups = list(rows)
    times, macs = [], []
    for _ in range(options.plans):
        widths = {name: max(1, round(full.sizes[name] * rng.uniform(0.4, 0.9))) for name in inner}
        plan = full.replace({n: np.sort(rng.permutation(full.sizes[n])[:w]).tolist() for n, w in widths.items()})
        fast, found = both.plan(plan)
        slow, expected = both.loop(plan)
        differing += found["top1"] != expected
        times.append((fast + shared_s / (55 * len(inner)), slow))
        macs.append(cost(both.graph, plan).macs)
    ours_s, loop_s = np.sum(times, axis=0).tolist()
    row("all groups", options.plans, loop_s, ours_s, float(np.mean(macs)), 0)
    for r in rows:
        r["limit_s"] = r.pop("gmacs") * 1e9 / both.rate
        r["times_limit"] = r["ours_s"] / r["limit_s"]
    ccep_speedup = sum(r["loop_s"] for r in groups) / sum(r["ours_s"] for r in groups)
    plan_speedup = rows[-1]["speedup"]
    ccep_limit = sum(r["ours_s"] for r in groups) / sum(r["limit_s"] for r in groups)
    plan_limit = rows[-1]["times_limit"]
    figures = [
        Figure("ccep_speedup", ccep_speedup, CCEP_SPEEDUP, ccep_speedup >= CCEP_SPEEDUP or ccep_limit <= TIMES_LIMIT),
        Figure("plan_speedup", plan_speedup, PLAN_SPEEDUP, plan_speedup >= PLAN_SPEEDUP or plan_limit <= TIMES_LIMIT),
        Figure("ccep_times_limit", ccep_limit, TIMES_LIMIT, ccep_speedup >= CCEP_SPEEDUP or ccep_limit <= TIMES_LIMIT),
        Figure("plan_times_limit", plan_limit, TIMES_LIMIT, plan_speedup >= PLAN_SPEEDUP or plan_limit <= TIMES_LIMIT),
        Figure("different_accuracies", differing, 0, differing == 0),
    ]
    title = (
        f"ResNet-56, {both.images} images, torch {torch.__version__}, {options.threads} thread(s); matrix product "
        f"{both.rate / 1e9:.0f} GMAC/s in {both.used}, which allows at most "
        f"{rows[-1]['loop_s'] / rows[-1]['limit_s']:.2g} for plans; choosing a way took {first_s:.0f} s\n"
        f"{both.oracle.accuracy.inference.describe()}"
    )
    present(title, rows, figures, options.json)


if __name__ == "__main__":
    main()
