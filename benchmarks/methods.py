"""Every search method and every control on one network: same MACs, same search work, same fine-tuning, several seeds.

    SECATEUR_DATA=... python benchmarks/methods.py [--only ccep,acp] [--seeds 0,1,2] [--minutes 90] [--fresh]
                                                   [--folder PATH] [--results PATH] [--write docs/reference/methods.md]
    SECATEUR_DATA=... python benchmarks/methods.py --calibrate

ResNet-20 with pretrained weights on all of CIFAR-10 (SECATEUR_DATA/cifar10: the arrays and weights that the CIFAR run
files read), half of its MACs, any width (``search.channel_multiple: 1``), scope ``auto``, the methods' default options.
A search may spend ``WORK`` image-MACs: an image forwarded counts the MACs of the network that it passes, an image
trained on three times as many. That is what 120 CPU-seconds of one thread were worth when it was calibrated; counted
in work and not in time, a search is the same on every processor and beside any other load. What a method computes
by itself is not in it and stands in the table. The best plan of the archive is fine-tuned for two epochs by one
recipe, with the unpruned network as teacher; the test split is read afterwards, three times: as the search left the
network, with batch-norm statistics taken anew, and fine-tuned. The fine-tuned network's answers are kept image by
image, so that a method and `uniform` of the same seed can be compared on the same images.

Every method and seed is one run with a journal in a folder of its own: a call that is interrupted, or ends because
``--minutes`` are over, is continued by the same call, and several calls at once share the work. Rows that are done
are in ``--results`` and are not repeated, unless ``uniform`` of their seed comes from another kind of processor.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.facts import Facts
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.stages.baseline import baseline
from secateur.pipeline.stages.finetune import finetune, revive_weights
from secateur.pipeline.stages.loading import load_baseline, load_compact
from secateur.pipeline.stages.search import search
from secateur.pipeline.training.statistics import recalibrate
from secateur.pruning.surgery import prune

RUN = """
name: methods
workload:
  name: classification
  model: {name: cifar/resnet20, weights: cifar10/resnet20_cifar10.safetensors}
  data:
    source: arrays
    train: cifar10/train
    test: cifar10/test
    mean: [0.485, 0.456, 0.406]
    std: [0.229, 0.224, 0.225]
    augment: flip_shift
    search_fraction: 0.1
device: {profile: local, probe: false}
search: {images: 500, channel_multiple: 1, scope: auto, min_keep_ratio: 0.1}
finetune: {top: 1, epochs: 2, lr: 0.02, autocast: auto}
"""
TARGET = 0.5
WORK = 4e12
"""Image-MACs of a search (``--calibrate``)."""
CALIBRATED_S = 120
METHODS_COMPARED = (
    "global random optuna cpmc dafp ccep acp icp meta rewarded_meta filter_ensemble evofc aofp dais"
).split()
CONTROL = "uniform"
CONTROLS = (CONTROL, "global", "random", "optuna")
SEEDS, FRESH_SEEDS = (0, 1, 2), (3, 4, 5)
RECALIBRATED = 2048
"""Training images behind the column "recalibrated"."""
PROJECTED = 0.25
"""Above this share of the removed MACs, it is the projection onto the target that chose, and not the method."""
BELOW_PP = 0.3
"""A mean so far below ``uniform`` counts as below, whatever its interval."""
DRAWS = 2000

Row = dict[str, Any]


# -- one run -----------------------------------------------------------------------------------------------------------


def run_file(method: str, seed: int) -> Any:
    """The run file of one row."""
    target = f"search.target.macs_ratio={TARGET}", f"search.budget.work={WORK:g}"
    return parse_run_file(RUN, "methods", [f"seed={seed}", f"search.method={method}", *target])


def measure(method: str, seed: int, folder: Path) -> Row:
    """One method under one seed, searched, tuned and tested; or what is left of it."""
    pointer = folder / f"{method}-{seed}"
    os.environ["SECATEUR_HOME"] = str(folder / "home")
    resumed = pointer.exists()
    if not resumed:
        pointer.write_text(str(create_run_directory(run_file(method, seed))), encoding="utf-8")
    with Run(Path(pointer.read_text(encoding="utf-8")), Silent()) as run:
        torch.set_num_threads(1)
        started = time.process_time()
        facts = Facts(baseline=baseline(run, Facts()))
        facts = facts.plus(search=search(run, facts))
        searched = None if resumed else round(time.process_time() - started, 1)
        facts = facts.plus(finetune=finetune(run, facts))
        return {"method": method, "seed": seed, **_origin(), **_results(run, facts), "search_cpu_s": searched}


def _results(run: Run, facts: Facts) -> Row:
    """What a row says, from the facts of a run's stages and from the test split."""
    model, graph = load_baseline(run)
    best, reference = facts.finetune.best, facts.search.reference
    (parent,) = best.candidate.parents
    chosen = next(e.candidate for e in facts.search.archive if e.candidate.id == parent)
    left = left_by_search(run, chosen.plan, chosen.base)
    cut = correct(run, left)
    recalibrate(left, training_batches(run))
    tuned = correct(run, load_compact(run, model, graph, chosen.plan))
    metric = run.workload.search_metric
    spent = facts.search.spent
    return {
        "macs_ratio": best.evaluation["macs"] / reference["macs"],
        "params_ratio": best.evaluation["params"] / reference["params"],
        "projected_share": chosen.projected_share,
        "scope": facts.search.scope.chosen,
        "metric": metric,
        "on_search_split": best.evaluation[metric],
        "as_cut": 100 * cut.mean(),
        "recalibrated": 100 * correct(run, left).mean(),
        "tuned": 100 * tuned.mean(),
        "latency_ratio": best.evaluation["latency_ratio"],
        "work": spent["image_macs"],
        "evaluations": int(spent["evaluations"]),
        "images": len(tuned),
        "unpruned": 100 * correct(run, model).mean(),
        "answers": packed(tuned),
    }


def left_by_search(run: Run, plan: Any, base: str) -> nn.Module:
    """The chosen network with the weights that the search left it."""
    model, graph = load_baseline(run)
    if not base:
        return prune(model, graph, plan)
    evaluator = run.evaluator(model, graph)
    revive_weights(run, evaluator)
    return evaluator.network(plan, base)


def training_batches(run: Run) -> Iterator[torch.Tensor]:
    """Images for batch-norm statistics, without augmentation."""
    split = run.workload.train.first(RECALIBRATED)
    for part in torch.split(torch.arange(len(split)), 512):
        yield run.workload.batch(split, part, train=False, generator=None, device=run.compute)[0]


def correct(run: Run, network: nn.Module) -> np.ndarray:
    """Which images of the test split a network answers rightly, shape ``(images,)``."""
    split, right = run.workload.test, []
    network = network.eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for part in torch.split(torch.arange(len(split)), 500):
            images, targets = run.workload.batch(split, part, train=False, generator=None, device=run.compute)
            right.append((network(images).argmax(1) == targets).numpy())
    return np.concatenate(right)


def _origin() -> Row:
    """Where and with what code a row was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"processor": processor(), "commit": commit.stdout.strip()}


def processor() -> str:
    """The kind of processor: its name, and whether it multiplies bfloat16 natively."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    names = {key.strip(): value.strip() for key, value in named.items()}
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set((names.get("flags") or names.get("Features", "")).split())
    return f"{names.get('model name', platform.machine())} ({'bf16' if native else 'fp32 only'})"


def packed(answers: np.ndarray) -> str:
    """One bit an image, as text."""
    return base64.b85encode(zlib.compress(np.packbits(answers).tobytes(), 9)).decode()


def unpacked(text: str, images: int) -> np.ndarray:
    """The inverse of ``packed``, shape ``(images,)``."""
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8))[:images].astype(bool)


# -- statistics --------------------------------------------------------------------------------------------------------


def paired(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of accuracy in percentage points, and its 95 % interval, paired over images, clustered by seed.

    Every draw takes seeds with replacement, and then images with replacement, the same ones for all seeds: images are
    shared by the seeds, so their part of the uncertainty does not shrink with more seeds.

    Args:
        ours, theirs: per seed, which images are answered rightly, shape ``(images,)``.
    """
    differences = np.stack([a.astype(np.int8) - b.astype(np.int8) for a, b in zip(ours, theirs, strict=True)])
    rng, (seeds, images) = np.random.default_rng(0), differences.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        of_seeds = differences[rng.integers(seeds, size=seeds)].mean(axis=0)
        means[draw] = of_seeds[rng.integers(images, size=images)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(differences.mean()), 100 * float(low), 100 * float(high)


def summarised(rows: Sequence[Row], seeds: Sequence[int]) -> list[Row]:
    """One line a method: means over its seeds, and the paired difference to ``uniform``; the best first."""
    by = {(row["method"], row["seed"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        pairs = [(by[method, s], by[CONTROL, s]) for s in seeds if (method, s) in by and (CONTROL, s) in by]
        if not pairs:
            continue
        mine = [row for row, _ in pairs]
        images = mine[0]["images"]
        answers = [[unpacked(row["answers"], images) for row in side] for side in zip(*pairs, strict=True)]
        gain, low, high = paired(*answers)
        tuned = [row["tuned"] for row in mine]
        lines.append(
            {
                "method": method,
                "seeds": len(mine),
                "tuned": float(np.mean(tuned)),
                "std": float(np.std(tuned, ddof=1)) if len(tuned) > 1 else float("nan"),
                "gain": gain,
                "low": low,
                "high": high,
                **{
                    key: float(np.mean([row[key] for row in mine]))
                    for key in ("as_cut", "recalibrated", "macs_ratio", "latency_ratio", "projected_share")
                },
                **{key: float(np.mean([row[key] for row in mine])) for key in ("work", "evaluations")},
                "search_cpu_s": _mean([row["search_cpu_s"] for row in mine]),
                "scope": "/".join(sorted({row["scope"] for row in mine})),
                "metric": "/".join(sorted({row["metric"] for row in mine})),
                "on_search_split": float(np.mean([row["on_search_split"] for row in mine])),
                "processors": sorted({row["processor"] for row in mine}),
                "commits": sorted({row["commit"] for row in mine}),
            }
        )
    return sorted(lines, key=lambda line: -line["tuned"])


def _mean(known: Sequence[float | None]) -> float:
    """The mean of what is known: a search that was resumed has no time of its own; NaN where nothing is."""
    values = [value for value in known if value is not None]
    return float(np.mean(values)) if values else float("nan")


def at_target(line: Row) -> bool:
    """Whether the MACs kept lie between 0.99 and 1.00 of the target."""
    return bool(0.99 * TARGET <= line["macs_ratio"] <= TARGET)


def below(line: Row) -> bool:
    """Whether a method loses to ``uniform``: its interval lies below zero, or its mean is well below."""
    return bool(line["method"] != CONTROL and (line["high"] < 0 or line["gain"] < -BELOW_PP))


def best_on_search_split(lines: Sequence[Row], *, higher_is_better: bool) -> str:
    """The method that a user would choose, who sees no test image."""
    choice = [line for line in lines if line["method"] not in CONTROLS]
    sign = 1 if higher_is_better else -1
    return str(max(choice, key=lambda line: sign * line["on_search_split"])["method"]) if choice else ""


# -- the page ----------------------------------------------------------------------------------------------------------


def page(lines: Sequence[Row], fresh: Sequence[Row], figures: Sequence[Figure], unpruned: float) -> str:
    """The results as a Markdown page."""
    processors = sorted({name for line in lines for name in line["processors"]})
    commits = sorted({name for line in lines for name in line["commits"]})
    text = (
        "# Search methods side by side\n\n"
        "Written by `SECATEUR_DATA=... python benchmarks/methods.py`, which says how it is done; all numbers of every "
        f"run are in `docs/reference/methods.json`. ResNet-20 on CIFAR-10, unpruned {unpruned:.2f} % on the test "
        f"split, cut to {TARGET:g} of its MACs; every search may spend {WORK:.3g} image-MACs ({CALIBRATED_S} "
        "CPU-seconds of one thread when calibrated), then two epochs of distilled fine-tuning. Mean and "
        "standard deviation over seeds; "
        "the difference to `uniform` is paired over images and clustered by seed, with its 95 % interval. Controls are "
        "in italics. † = more than a quarter of the removed MACs were chosen by the projection onto the target and not "
        f"by the method.\n\nProcessors: {'; '.join(processors)}. Commits: {', '.join(commits)}.\n\n"
    )
    for figure in figures:
        text += f"- `{figure.name}`: {figure.value:.4g} (bound {figure.bound:g}: {'kept' if figure.ok else 'MISSED'})\n"
    text += "\n" + _table(lines)
    if fresh:
        text += "\n## The method chosen on the search split, with fresh seeds\n\n" + _table(fresh)
    return text


def _table(lines: Sequence[Row]) -> str:
    head = (
        *("method", "seeds", "MACs kept", "as cut %", "recalibrated %", "tuned %", "difference to uniform, pp"),
        *("latency ratio", "scope", "metric", "projected", "work, T", "search CPU s", "evaluated"),
    )
    text = "| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n"
    for line in lines:
        name = f"*{line['method']}*" if line["method"] in CONTROLS else line["method"]
        spread = "" if np.isnan(line["std"]) else f" ± {line['std']:.2f}"
        gain = "" if line["method"] == CONTROL else f"{line['gain']:+.2f} ({line['low']:+.2f} to {line['high']:+.2f})"
        mark = " †" if line["projected_share"] > PROJECTED else ""
        cells = (
            *(name, str(line["seeds"]), f"{line['macs_ratio']:.4f}", f"{line['as_cut']:.2f}"),
            *(f"{line['recalibrated']:.2f}", f"{line['tuned']:.2f}{spread}", gain, f"{line['latency_ratio']:.3f}"),
            *(line["scope"], line["metric"], f"{line['projected_share']:.2f}{mark}", f"{line['work'] / 1e12:.2f}"),
            *("" if np.isnan(line["search_cpu_s"]) else f"{line['search_cpu_s']:.0f}", f"{line['evaluations']:.0f}"),
        )
        text += "| " + " | ".join(cells) + " |\n"
    return text


# -- the results so far ------------------------------------------------------------------------------------------------


class Results:
    """The rows that are done, in one JSON file that several calls share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Every row so far."""
        return list(json.loads(self.path.read_text(encoding="utf-8"))["rows"]) if self.path.exists() else []

    def has(self, method: str, seed: int, kind: str | None = None) -> bool:
        """Whether a row is done; on a kind of processor, if one is named."""
        return any(
            row["method"] == method and row["seed"] == seed and kind in (None, row["processor"]) for row in self.rows()
        )

    def add(self, row: Row) -> None:
        """Write a row, in place of an older one of the same method and seed."""
        with locked(self.path.with_suffix(".lock")):
            kept = [r for r in self.rows() if (r["method"], r["seed"]) != (row["method"], row["seed"])]
            self.write([*kept, row])

    def write(self, rows: Sequence[Row], **more: Any) -> None:
        """Write all rows, one a line, so that a difference can be read."""
        ordered = sorted(rows, key=lambda row: (row["method"], row["seed"]))
        text = ",\n".join(json.dumps(row) for row in ordered)
        other = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in more.items())
        partial = self.path.with_suffix(".part")
        partial.write_text(f'{{\n{other}"rows": [\n{text}\n]\n}}\n', encoding="utf-8")
        partial.replace(self.path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; without waiting, says whether it could be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def calibrate() -> None:
    """How many image-MACs of forward passes 120 CPU-seconds of one thread are worth here."""
    torch.set_num_threads(1)
    config = run_file(CONTROL, 0)
    from secateur.pipeline.run.opening import open_workload
    from secateur.pruning.cost import cost
    from secateur.pruning.plan import PruningPlan
    from secateur.pruning.trace import trace

    workload = open_workload(config)
    model = workload.build_model().eval().to(memory_format=torch.channels_last)
    graph = trace(model, workload.example_input())
    macs = cost(graph, PruningPlan.full(graph.groups)).macs
    images = workload.batch(
        workload.search, torch.arange(100), train=False, generator=None, device=torch.device("cpu")
    )[0]
    started, seen = time.process_time(), 0
    with torch.inference_mode():
        while time.process_time() - started < 10:
            model(images)
            seen += len(images)
    rate = macs * seen / (time.process_time() - started)
    print(f"{processor()}: {rate / 1e9:.1f} G image-MACs a CPU-second, {CALIBRATED_S * rate:.3g} in {CALIBRATED_S} s")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", help="methods, separated by commas (default: all, controls included)")
    arguments.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="separated by commas (default 0,1,2)")
    arguments.add_argument("--fresh", action="store_true", help="repeat the chosen method with three fresh seeds")
    arguments.add_argument("--minutes", type=float, default=90, help="begin no row after so long (default 90)")
    arguments.add_argument("--folder", type=Path, default=Path("methods-work"), help="journals and weights")
    arguments.add_argument(
        "--results", type=Path, default=Path("docs/reference/methods.json"), help="rows that are done"
    )
    arguments.add_argument("--write", type=Path, metavar="PATH", help="write the table as a Markdown page")
    arguments.add_argument("--calibrate", action="store_true", help="say what the search's work is worth here, and end")
    options = arguments.parse_args()
    if options.calibrate:
        calibrate()
        return
    results, started = Results(options.results), time.monotonic()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = options.only.split(",") if options.only else METHODS_COMPARED
    if options.fresh:
        chosen = best_on_search_split(summarised(results.rows(), SEEDS), higher_is_better=_higher(results))
        names, seeds = [chosen], list(FRESH_SEEDS)
    for seed in seeds:
        for method in (CONTROL, *names):
            if time.monotonic() - started > 60 * options.minutes:
                print("the time is over; call again to continue")
                break
            _do(method, seed, options.folder, results)
    show(results, options.json, options.write)


def _do(method: str, seed: int, folder: Path, results: Results) -> None:
    """One row, unless it is done here or being done by another call."""
    kind = processor() if method == CONTROL else None
    with locked(folder / f"{method}-{seed}.lock", wait=False) as mine:
        if not mine or results.has(method, seed, kind):
            return
        try:
            row = measure(method, seed, folder)
        except Exception as error:  # noqa: BLE001  one method that fails must not hide the others
            print(f"{method}, seed {seed}: {type(error).__name__}: {error}", flush=True)
            return
        results.add(row)
        print(f"{method}, seed {seed}: MACs {row['macs_ratio']:.4f}, {row['tuned']:.2f} %", flush=True)


def _higher(results: Results) -> bool:
    """Whether the metric that chose is better when it is higher."""
    return results.rows()[0]["metric"] not in ("loss", "divergence")


def show(results: Results, path: Path | None, write: Path | None) -> None:
    """Figures and table of what is done so far."""
    rows = results.rows()
    lines = summarised(rows, SEEDS)
    if not lines:
        sys.exit("no method is done")
    fresh = [line for line in summarised(rows, FRESH_SEEDS) if line["method"] != CONTROL]
    methods = [line for line in lines if line["method"] not in CONTROLS]
    met, lost = sum(map(at_target, lines)), sum(map(below, methods))
    figures = [
        Figure("methods_at_target", met, len(lines), met == len(lines)),
        Figure("methods_below_uniform", lost, 0, lost == 0),
        *(Figure("best_minus_uniform_pp", line["gain"], 0.5, line["gain"] >= 0.5) for line in fresh[:1]),
    ]
    columns = ("method", "seeds", "macs_ratio", "as_cut", "recalibrated", "tuned", "std", "gain", "low", "high")
    present("ResNet-20 on CIFAR-10, half of the MACs", [{k: line[k] for k in columns} for line in lines], figures, path)
    if write:
        write.write_text(page(lines, fresh, figures, rows[0]["unpruned"]), encoding="utf-8")


if __name__ == "__main__":
    main()
