"""How honest an interval is: on made-up processes whose truth is known, and a network against itself and a slower one.

    python benchmarks/noise.py [--device local] [--repeats 20] [--tier final] [--json PATH]
    python benchmarks/noise.py --synthetic            (seconds; no device)
    python benchmarks/noise.py --claims 200 --load 1  (A/A of the search tier beside a busy core)
    python benchmarks/noise.py --promotions 40        (the relative gates with the default final tier)

A CIFAR ResNet-20 with random weights is measured beside a copy of itself (A/A), and beside itself with one more
convolution of about 3 % of its time (A/B), each `--repeats` times at the tier, one after the other.

`aa_coverage`: share of A/A measurements whose 95 % interval covers the ratio 1. `power_3pct`: share of A/B measurements
whose interval lies above 1. The true ratio of A/B is the median of all its measurements, and printed: it has to be near
1.03 for the figure to mean anything. How wide the intervals are, and how the ratios scatter, stands beside it.

Synthetic: calls scatter by 0.5 %, processes by 1 %, 2,000 trials. `coverage_N`: share of intervals from N processes
that hold the true ratio, beside the percentile bootstrap over processes; under three an interval is unknown.
`half_width_7`: median half-width from seven, per cent. `coverage_within_W`: the same when measuring ends as soon as the
interval is no wider than +-W % (`secateur benchmark --within`), and how many processes that took. `gate_aa`,
`gate_at_1_05`, `gate_at_1_10`: share of trials in which the p50 gate of 5 % passes, more processes being asked for
while it is undecided; the second is a challenger exactly at the limit.

Claims: share of A/A comparisons of the search tier that say "faster" or "slower" (an interval without 1).
Promotions: share of A/A and of A/B at a ratio near 1.10 that pass the latency gates of `secateur promote`.
"""

from __future__ import annotations

import copy
import multiprocessing
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
from secateur.device_profiles import BenchmarkResult, DeviceProfile, Ratio, Target, load_profile, measure, open_target
from secateur.device_profiles.intervals import MANY_PROCESSES, MIN_PROCESSES_TO_STOP, is_look, of_processes
from secateur.export import export_onnx
from secateur.pipeline.workloads.networks import build_network

EXTRA = 0.03
TRIALS, CALL_NOISE, PROCESS_NOISE, CALLS = 2000, 0.005, 0.01, 50
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


def near_extra(
    target: Target, profile: DeviceProfile, model: onnx.ModelProto, folder: Path, extra: float = EXTRA
) -> Path:
    """The file of the slower network whose ratio comes nearest to 1 + extra."""
    tier = profile.final.model_copy(update={"processes": 3})
    found = {}
    for channels in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        path = folder / f"slower-{channels}.onnx"
        onnx.save(slower(model, channels), path)
        value = ratio(target, profile, {"a": folder / "a.onnx", "b": path}, tier).value
        found[path] = abs(value - 1 - extra)
        print(f"\r{channels} more channels: ratio {value:.4f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return min(found, key=lambda path: found[path])


# -- made-up processes -------------------------------------------------------------------------------------------------


def process_ratios(rng: np.random.Generator, count: int, true: float = 1.0) -> np.ndarray:
    """What each of so many processes says of a ratio: medians of noisy calls of both models, with the process's own
    offset, shape ``(count,)``."""
    calls = np.exp(CALL_NOISE * rng.standard_normal((count, 2, CALLS)))
    middle = np.median(calls, axis=2)
    return np.asarray(true * np.exp(PROCESS_NOISE * rng.standard_normal(count)) * middle[:, 0] / middle[:, 1])


def percentile_bootstrap(ratios: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The interval as it was before: percentiles of resampled processes (calls within add little here)."""
    means = np.log(ratios)[rng.integers(len(ratios), size=(400, len(ratios)))].mean(axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return float(low), float(high)


def narrowed(rng: np.random.Generator, within: float) -> tuple[Ratio, int]:
    """Measured until the interval is no wider than +- within, as ``measure`` does it."""
    ratios = process_ratios(rng, MIN_PROCESSES_TO_STOP)
    while True:
        found = of_processes(ratios)
        narrow = is_look(len(ratios), MIN_PROCESSES_TO_STOP) and found.half_width / found.value <= within
        if narrow or len(ratios) >= MANY_PROCESSES:
            return found, len(ratios)
        ratios = np.append(ratios, process_ratios(rng, 1))


def gated(rng: np.random.Generator, true: float, bound: float = 1.05, first: int = 7, last: int = 28) -> bool:
    """Whether the p50 gate passes, with more processes while it is undecided."""
    ratios = process_ratios(rng, first, true)
    while len(ratios) < last:
        found = of_processes(ratios)
        if is_look(len(ratios), first) and not found.low <= bound < found.high:
            break
        ratios = np.append(ratios, process_ratios(rng, 1, true))
    return of_processes(ratios).high <= bound


def synthetic(path: Path | None) -> None:
    rng = np.random.default_rng(0)
    rows, figures = [], []
    for count in (1, 2, 3, 4, 7, 20):
        trials = [process_ratios(rng, count) for _ in range(TRIALS)]
        found = [of_processes(ratios) for ratios in trials]
        covered = float(np.mean([ratio.low <= 1 <= ratio.high for ratio in found if ratio.known] or [np.nan]))
        before = float(np.mean([low <= 1 <= high for low, high in (percentile_bootstrap(r, rng) for r in trials)]))
        width = 100 * float(np.median([ratio.half_width for ratio in found]))
        known = found[0].known
        row = {"processes": count, "covers the truth": covered if known else "unknown"}
        rows.append(row | {"half-width %": width if known else "unknown", "bootstrap covers it": before})
        if known:
            figures.append(Figure(f"coverage_{count}", covered, 0.93, covered >= 0.93))
        else:
            unknown = sum(not ratio.known for ratio in found)
            figures.append(Figure(f"unknown_{count}", unknown / TRIALS, 1.0, unknown == TRIALS))
        if count == 7:
            figures.append(Figure("half_width_7", width, 1.0, width <= 1.0))
    for within in (0.5, 1.0, 2.0):
        ended = [narrowed(rng, within / 100) for _ in range(TRIALS)]
        covered = float(np.mean([ratio.low <= 1 <= ratio.high for ratio, _ in ended]))
        count = float(np.median([n for _, n in ended]))
        rows.append({"processes": f"until +-{within:g} %: {count:g}", "covers the truth": covered})
        figures.append(Figure(f"coverage_within_{within:g}", covered, 0.93, covered >= 0.93))
    for name, true in (("aa", 1.0), ("at_1_05", 1.05), ("at_1_10", 1.1)):
        share = float(np.mean([gated(rng, true) for _ in range(TRIALS)]))
        bound = {"aa": 0.9, "at_1_05": 0.075, "at_1_10": 0.05}[name]  # at the limit: three looks of 2.5 %
        figures.append(Figure(f"gate_{name}", share, bound, share >= bound if name == "aa" else share <= bound))
    columns = list(rows[0])
    present("made-up processes", [{c: row.get(c, "") for c in columns} for row in rows], figures, path)


# -- a real device -----------------------------------------------------------------------------------------------------


def _spin() -> None:
    while True:
        pass


def claims(target: Target, profile: DeviceProfile, files: dict[str, Path], count: int, load: int) -> list[Figure]:
    """A/A at the search tier beside busy cores."""
    others = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(load)]
    for other in others:
        other.start()
    try:
        found = []
        for i in range(count):
            found.append(ratio(target, profile, files, "search"))
            print(f"\r{i + 1} of {count} A/A", end="", file=sys.stderr)
        print(file=sys.stderr)
    finally:
        for other in others:
            other.terminate()
    share = float(np.mean([r.low > 1 or r.high < 1 for r in found]))
    return [Figure("aa_claims", share, 0.05, share <= 0.05)]


def promotions(target: Target, profile: DeviceProfile, files: dict[str, Path], count: int) -> float:
    """Share of comparisons that pass the latency gates with the default final tier."""
    from secateur.pipeline.config.schema import GateSection
    from secateur.pipeline.lifecycle.promotion import ratios, undecided

    section = GateSection(max_resource_increase=None)
    champion, challenger = files.values()
    models = {"champion": champion, "challenger": challenger}

    def decided(result: BenchmarkResult) -> bool:
        return not any(undecided(found, bound) for _, found, bound in ratios(section, result))

    passed = 0
    for i in range(count):
        result = measure(target, profile, models, "final", until=decided)
        passed += all(found is not None and found.high <= bound for _, found, bound in ratios(section, result))
        print(f"\r{i + 1} of {count} promotions, {passed} passed", end="", file=sys.stderr)
    print(file=sys.stderr)
    return passed / count


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="local")
    arguments.add_argument("--repeats", type=int, default=20)
    arguments.add_argument("--tier", choices=("search", "final"), default="final")
    arguments.add_argument("--synthetic", action="store_true", help="only made-up processes")
    arguments.add_argument("--claims", type=int, default=0, metavar="N", help="only N A/A at the search tier")
    arguments.add_argument("--load", type=int, default=1, metavar="N", help="busy processes beside --claims")
    arguments.add_argument("--promotions", type=int, default=0, metavar="N", help="only N comparisons of each kind")
    options = arguments.parse_args()
    if options.synthetic:
        synthetic(options.json)
        return
    torch.manual_seed(0)
    profile = load_profile(options.device)
    target = open_target(profile)
    network = build_network("cifar/resnet20", 10, (3, 32, 32), {}).eval()
    pairs: dict[str, list[Any]] = {"A/A": [], "A/B": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_onnx(network, torch.randn(1, 3, 32, 32), folder / "a.onnx")
        (folder / "copy.onnx").write_bytes((folder / "a.onnx").read_bytes())
        same = {"a": folder / "a.onnx", "b": folder / "copy.onnx"}
        if options.claims or options.promotions:
            figures = claims(target, profile, same, options.claims, options.load) if options.claims else []
            if options.promotions:
                tenth = near_extra(target, profile, onnx.load(folder / "a.onnx"), folder, 0.10)
                share = promotions(target, profile, same, options.promotions)
                slow = promotions(target, profile, {"a": folder / "a.onnx", "b": tenth}, options.promotions)
                figures += [Figure("promotion_aa", share, 0.9, share >= 0.9)]
                figures += [Figure("promotion_at_1_10", slow, 0.05, slow <= 0.05)]
            target.close()
            present("on the device", [{"figure": f.name, "value": f.value} for f in figures], figures, options.json)
            return
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
