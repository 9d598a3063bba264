"""Every search method and every control on one network, at the same MACs, search budget and fine-tuning.

    SECATEUR_DATA=... python benchmarks/methods.py [--profile cpu|gpu] [--only ccep,acp] [--minutes 40]
                                                   [--folder PATH] [--json PATH] [--write docs/methods.md]

ResNet-56 with pretrained weights on CIFAR-10 (SECATEUR_DATA/cifar10: the arrays and weights that the CIFAR run files
read). Each method searches with the same number of search images within the same budget of seconds and of training
epochs; of the plans it returns that meet the MACs target, the most accurate one on the search split is fine-tuned for
the same number of epochs with the unpruned network as teacher. The test split is read afterwards: as the search leaves
the network, and fine-tuned. `scratch` trains the plan of `uniform` from random
weights for the same epochs. Latency is the local device's, as a ratio to the unpruned network, one thread.

Each method has its own folder with a journal: a call that is interrupted, or ends because `--minutes` are over, is
continued by the same call again, and methods that are done are not repeated.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.device_profiles import load_profile, open_target
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.opening import open_workload, widths_costs
from secateur.pipeline.run.study import Study
from secateur.pruning import SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import RANDOM, Budget, Candidate, Entry, FineTune, Goal, Problem
from secateur.pruning.search.reward import make_reward

RUN = """
name: methods
workload:
  name: classification
  model: {name: cifar/resnet56, weights: cifar10/resnet56_cifar10.safetensors}
  data:
    source: arrays
    train: cifar10/train
    test: cifar10/test
    mean: [0.485, 0.456, 0.406]
    std: [0.229, 0.224, 0.225]
    augment: flip_shift
    search_fraction: 0.1
device: {profile: local, channel_multiple: 4}
search: {min_keep_ratio: 0.1}
"""


@dataclass(frozen=True)
class Scale:
    """One size of the comparison.

    Args:
        targets: shares of the MACs that are kept.
        images: search images per candidate.
        seconds: of search, per method.
        epochs: of training during the search, per method.
        tune_epochs: of the final fine-tuning.
        lr: of all training.
        options: method -> its options at this size.
    """

    targets: tuple[float, ...]
    images: int
    seconds: float
    epochs: float
    tune_epochs: float
    lr: float
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


CPU: dict[str, Mapping[str, Any]] = {
    "acp": {"population": 4, "cycles": 2, "fitness_epochs": 0.01},
    "aofp": {"batches": 8, "threshold": 0.05, "finetune_epochs": 0},
    "ccep": {
        "outer_iterations": 4,
        "population": 3,
        "generations": 1,
        "initial_keep": 0.6,
        "ratio_bound": 0.4,
        "accuracy_step": 0.02,
        "finetune_epochs": 0.03,
    },
    "dafp": {"epochs": 0},  # sparse training needs epochs; 0.15 of one destroyed the network (19.5 % fine-tuned)
    "dais": {"epochs": 0.15},
    "evofc": {
        "population": 4,
        "offspring": 4,
        "generations": 3,
        "epochs": 0.15,
        "criteria_on": "inherited",
        "start": "pretrained",
        "final": "inherit",
    },
    "filter_ensemble": {"bundle": 8, "min_masks": 1, "max_masks": 1, "images": 200},
    "icp": {"rounds": 2, "finetune_epochs": 0.07},
    "meta": {"weights": "shared", "epochs": 0.15, "population": 8, "parents": 3, "iterations": 3, "top": 4},
    "optuna": {"num_plans": 20},
    "random": {"num_plans": 20},
    "rewarded_meta": {"weights": "shared", "epochs": 0.15, "population": 8, "parents": 3, "iterations": 3, "top": 4},
}
SCALES = {
    "cpu": Scale((0.5,), 500, 60.0, 0.15, 0.2, 0.02, CPU),
    "gpu": Scale((0.5, 0.37), 5000, 1800.0, 60.0, 60.0, 0.05),
}
TRIED = (
    "uniform global random optuna cpmc dafp ccep acp icp meta rewarded_meta filter_ensemble evofc aofp dais"
).split()
CONTROLS = ("uniform", "global", "random", "optuna", "scratch")


class Bench:
    """The network, its data and its device, opened once."""

    def __init__(self, scale: Scale, threads: int, channel_multiple: int = 4) -> None:
        torch.set_num_threads(threads)
        self.scale, self.config = scale, _config(scale)
        self.workload = open_workload(self.config)
        self.model = self.workload.build_model()
        self.graph = trace(self.model, self.workload.example_input())
        self.space = SearchSpace.of(self.graph.groups, channel_multiple=channel_multiple, min_keep_ratio=0.1)
        self.profile = load_profile("local")
        self.target = open_target(self.profile)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def evaluator(self, folder: Path) -> Evaluator:
        baseline = Baseline(self.model, self.graph, self.workload, compute=self.device)
        fleet = Fleet([Device(self.profile, self.target)])
        return make_evaluator(baseline, fleet, folder, self.config.search, self.config.finetune)

    def run(self, method: str, share: float, folder: Path) -> dict[str, Any]:
        """One method at one target, or what is left of it: a row of the table."""
        folder.mkdir(parents=True, exist_ok=True)
        template, shared = folder / "template.onnx", folder.parent / "template.onnx"
        if shared.exists() and not template.exists():
            shutil.copyfile(shared, template)  # the same for every method, and half a minute to export
        oracle = self.evaluator(folder)
        searched = "uniform" if method == "scratch" else method
        with Journal(folder / "journal.jsonl", method, self.config.digest) as journal:
            first = Study(journal, oracle, stage="reference")
            reference = first.evaluate(Candidate(0, self.space.full, "reference"), latency=True)
            oracle.calibrate(reference)
            if not shared.exists():
                shutil.copyfile(template, shared)
            budget = Budget(seconds=self.scale.seconds, epochs=self.scale.epochs)
            problem = Problem(
                self.space,
                reference,
                make_reward("device", reference, target_macs_ratio=share),
                lambda widths: widths_costs(self.graph, self.space, widths),
                Goal(macs_ratio=share),
                np.random.default_rng(0),
                budget,
            )
            module = METHODS.load(searched)
            options = module.Options(**self.scale.options.get(searched, {}))
            study = Study(journal, oracle, stage="search", budget=budget)
            archive = study.run(module.search(problem, options))
            best = chosen(archive, share * reference["macs"])
            candidate = Candidate(0, best.candidate.plan, "final", (), best.candidate.base)
            if method == "scratch":
                candidate = Candidate(0, candidate.plan, "final", (), RANDOM)
            raw = self.test(oracle.network(candidate.plan, candidate.base))
            final = Study(journal, oracle, stage="final")
            tuned = final.finetune(FineTune(candidate, self.scale.tune_epochs))
            return {
                "method": method,
                "MACs kept": tuned.evaluation["macs"] / reference["macs"],
                "as cut %": 100 * raw,
                "fine-tuned %": 100 * self.test(oracle.network(candidate.plan, tuned.base)),
                "latency ratio": tuned.evaluation["latency_ratio"],
                "search s": study.spent["seconds"],
                "evaluated": int(study.spent["evaluations"]),
                "images seen k": study.spent.get("images_forwarded", 0) / 1000,
                "images trained k": study.spent.get("images_trained", 0) / 1000,
                "timed": int(study.spent.get("measurements", 0)),
            }

    def test(self, network: nn.Module) -> float:
        """Top-1 on the test split, a fraction."""
        split, right = self.workload.test, 0
        with torch.inference_mode():
            for part in torch.split(torch.arange(len(split)), 500):
                images, targets = self.workload.batch(split, part, train=False, generator=None, device=self.device)
                right += int((network(images).argmax(1) == targets).sum())
        return right / len(split)


def chosen(archive: tuple[Entry, ...], macs: float) -> Entry:
    """The most accurate plan of an archive that meets the target (the smallest one, if none does)."""
    within = [entry for entry in archive if entry.evaluation["macs"] <= macs]
    if not within:
        return min(archive, key=lambda entry: entry.evaluation["macs"])
    return max(within, key=lambda entry: entry.evaluation["top1"])


def _config(scale: Scale) -> RunFile:
    tuning = f"finetune.lr={scale.lr}", f"finetune.epochs={scale.tune_epochs}", "finetune.precision=auto"
    return parse_run_file(RUN, "methods", [f"search.images={scale.images}", *tuning])


def table(rows: list[dict[str, Any]], command: str, unpruned: float, scale: Scale) -> str:
    """The rows as a Markdown page."""
    head = (
        "# Search methods side by side\n\n"
        f"Written by `{command}`. ResNet-56 on CIFAR-10, unpruned {unpruned:.2f} % on the test split; every method "
        f"searched within {scale.seconds:g} s and {scale.epochs:g} epochs of training with {scale.images:,} search "
        f"images, then {scale.tune_epochs:g} epochs of distilled fine-tuning. One seed. Controls are in italics.\n\n"
    )
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda row: (row["target"], row["MACs kept"] > row["target"], -row["fine-tuned %"])):
        cells = [
            f"{v:.3f}" if "ratio" in k or "kept" in k else f"{v:.2f}" if isinstance(v, float) else str(v)
            for k, v in row.items()
        ]
        cells[1] = f"*{cells[1]}*" if cells[1] in CONTROLS else cells[1]
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--profile", choices=sorted(SCALES), default="cpu", help="how large (default cpu)")
    arguments.add_argument("--only", help="methods, separated by commas (default: all, controls included)")
    arguments.add_argument("--minutes", type=float, default=90, help="begin no method after so long (default 90)")
    arguments.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    arguments.add_argument("--folder", type=Path, default=Path("methods-work"), help="journals and results")
    arguments.add_argument("--write", type=Path, metavar="PATH", help="write the table as a Markdown page")
    options = arguments.parse_args()
    scale, started = SCALES[options.profile], time.monotonic()
    bench = Bench(scale, options.threads)
    names = options.only.split(",") if options.only else [*TRIED, "scratch"]
    rows: list[dict[str, Any]] = []
    for share in scale.targets:
        for name in names:
            folder = options.folder / f"{options.profile}-{share:g}" / name
            result = folder / "result.json"
            if not result.exists():
                if time.monotonic() - started > 60 * options.minutes:
                    print(f"{name} at {share:g}: not begun, the time is over; call again to continue")
                    continue
                try:
                    row = {"target": share, **bench.run(name, share, folder)}
                except Exception as error:  # noqa: BLE001  one method that fails must not hide the others
                    print(f"{name} at {share:g}: {type(error).__name__}: {error}")
                    continue
                result.write_text(json.dumps(row) + "\n", encoding="utf-8")
                print(f"{name} at {share:g}: {row['fine-tuned %']:.2f} % after {time.monotonic() - started:.0f} s")
            rows.append(json.loads(result.read_text(encoding="utf-8")))
    bench.target.close()
    if not rows:
        sys.exit("no method is done")
    uniform = {row["target"]: row["fine-tuned %"] for row in rows if row["method"] == "uniform"}
    figures = [
        Figure(f"{row['method']}_over_uniform_pp_{row['target']:g}", gain, 0.0, gain >= 0)
        for row in rows
        if row["method"] not in CONTROLS and row["target"] in uniform
        for gain in [row["fine-tuned %"] - uniform[row["target"]]]
    ]
    present(f"ResNet-56 on CIFAR-10, profile {options.profile}", rows, figures, options.json)
    if options.write:
        settings = f"--profile {options.profile} --threads {options.threads} --write {options.write}"
        command = f"SECATEUR_DATA=... python benchmarks/methods.py {settings}"
        options.write.write_text(table(rows, command, 100 * bench.test(bench.model), scale), encoding="utf-8")


if __name__ == "__main__":
    main()
