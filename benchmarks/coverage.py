"""Which networks can be pruned, proven right: every float network of torchvision, and one of each timm family.

    python benchmarks/coverage.py [--timm] [--peer torch-pruning] [--only REGEX] [--write PATH] [--json PATH]
    python benchmarks/coverage.py --zoo NAME [--zoo NAME ...]    networks of other packages instead: `_other_zoos.py`

Each network runs in a process of its own under a time limit, with random weights and one thread: trace, keep a random
half of the channels of every group, prune, certify against the masked network, compare `cost` with counting, and check
that gradients reach every parameter they reach in the dense network.

- ok: all of that holds, and something was pruned;
- wrong: a pruned network that fails, differs, or costs something else than `cost` said (MACs to one in a thousand and
  bytes to one in a hundred: kernels copy at one width and not at another, and the choice of boxes follows the values);
- refused: nothing can be pruned, or an error that says why.

The peer gets the same network, input and keep ratio in the same process, and its classifiers named as layers to leave
alone; it is ok if the pruned network runs, keeps its output shapes and has fewer MACs (no values are compared).
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

import secateur.pruning.trial  # noqa: F401 - before the forks
from benchmarks._other_zoos import ZOOS
from benchmarks._output import Figure, parser, present
from benchmarks._zoo import TIMM, build, torchvision_names
from secateur.pruning import ChannelGraph, PruningPlan, certify, cost, prune, uniform_plan
from secateur.pruning.cost import Cost, count
from secateur.pruning.reference import masked_tensors
from secateur.pruning.tracer import Tracer, named_tensors

Row = dict[str, Any]
Example = tuple[Any, ...]
DETECTION = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssd")
SEGMENTATION = ("deeplabv3", "fcn_", "lraspp")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def forward_seconds(model: nn.Module, example: Example) -> float:
    """Median of three warm forward passes."""
    with torch.no_grad():
        model(*example)
        return statistics.median(timed(lambda: model(*example))[0] for _ in range(3))


def ours(model: nn.Module, example: Example) -> Row:
    """Trace, halve, prune, prove."""
    row: Row = {"status": "refused"}
    try:
        row["forward_s"] = forward_seconds(model, example)
        row["trace_s"], graph = timed(lambda: trace(model, *example))
    except Exception as error:  # noqa: BLE001 - the table says what happened
        return row | {"why": f"{type(error).__name__}: {error}"}
    row["groups"] = len(graph.groups)
    row["frozen_macs"] = sum({f.layer: f.macs_share for f in graph.frozen}.values())
    row["frozen_why"] = next((f.reason for f in sorted(graph.frozen, key=lambda f: -f.macs_share)), "")
    if not graph.groups:
        return row | {"why": "no channel group"}
    try:
        return row | proven(model, example, graph)
    except Exception as error:  # noqa: BLE001
        return row | {"status": "wrong", "why": f"{type(error).__name__}: {error}"}


def proven(model: nn.Module, example: Example, graph: ChannelGraph) -> Row:
    """The part of a row that says whether half of every group can go."""
    row: Row = {"status": "wrong"}
    plan = uniform_plan(graph, 0.5, saliency="random", seed=1)
    row["prune_s"], pruned = timed(lambda: prune(model, graph, plan))
    certificate = certify(model, pruned, graph, plan, *example)
    row |= {"error": certificate.max_relative_error, "why": certificate.reason}
    if not certificate.ok:
        return row
    predicted, counted = cost(graph, plan), count(pruned, *example)
    row["macs_left"] = predicted.macs / max(1, cost(graph, PruningPlan.full(graph.groups)).macs)
    if row["macs_left"] >= 1:
        return row | {"status": "refused", "why": "nothing was pruned"}
    if predicted != counted and not same_but_for_copies(predicted, counted):
        is_detector = isinstance(example[0], list)
        if not is_detector or not same_but_for_copies(masked_cost(model, example, graph, plan), counted):
            return row | {"why": f"cost {predicted} but counted {counted}"}
    if lost := gradients(model, example) - gradients(pruned, example):
        return row | {"why": f"no gradient for {sorted(lost)[:3]}"}
    return row | {"status": "ok"}


def masked_cost(model: nn.Module, example: Example, graph: ChannelGraph, plan: PruningPlan) -> Cost:
    """Cost of a plan in the run of the masked network: the number of boxes follows the values."""
    masked = copy.deepcopy(model)
    masked.load_state_dict(masked_tensors(model, graph, plan), strict=False)
    tracer = Tracer(masked, graph.rules)
    tracer.run(example, {})
    kept = np.ones(tracer.labels.num_labels, dtype=bool)
    for name, dims in graph.slices(plan).items():
        for place, d, labels in tracer.places:
            if place == name and d in dims:
                kept[np.delete(labels, dims[d])] = False

    def total(products: Sequence[tuple[Any, ...]]) -> int:
        return sum(p[0] * math.prod(int(kept[tracer.dims[i]].sum()) for i in p[1]) for p in products)

    return Cost(total(tracer.macs), cost(graph, plan).params, total(tracer.bytes))


def same_but_for_copies(predicted: Cost, counted: Cost) -> bool:
    """Equal MACs (to one in a thousand) and params, and activation bytes to one in a hundred.

    PyTorch's kernels copy a tensor at one width and not at another, and a box more or less moves a detector's numbers.
    """
    macs = abs(predicted.macs - counted.macs) <= 1e-3 * counted.macs
    written = abs(predicted.activation_bytes - counted.activation_bytes) <= 1e-2 * counted.activation_bytes
    return macs and written and predicted.params == counted.params


def gradients(model: nn.Module, example: Example) -> set[str]:
    """Parameters that the outputs' gradients reach."""
    outputs = [t for _, t in named_tensors(model(*example)) if t.requires_grad]
    model.zero_grad(set_to_none=True)
    sum(t.sum() for t in outputs).backward() if outputs else None
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return reached


def peer_pruner(model: nn.Module, example: Example) -> Any:
    """Torch-Pruning's magnitude pruner for half of the channels."""
    import torch_pruning as tp

    return tp.pruner.MagnitudePruner(
        model,
        example if len(example) == 1 else list(example),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=heads(model),
    )


def peers(model: nn.Module, example: Example) -> Row:
    """The same with the peer; the model is changed."""
    row: Row = {"peer": "refused"}
    with torch.no_grad():
        shapes = {path: tuple(t.shape)[1:] for path, t in named_tensors(model(*example))}
    before = count(model, *example).macs
    try:
        started = time.perf_counter()
        peer_pruner(model, example).step()
        row["peer_s"] = time.perf_counter() - started
    except Exception as error:  # noqa: BLE001
        return row | {"peer_why": f"{type(error).__name__}: {error}"}
    try:
        with torch.no_grad():
            after = {path: tuple(t.shape)[1:] for path, t in named_tensors(model(*example))}
        row["peer_macs_left"] = count(model, *example).macs / max(1, before)
    except Exception as error:  # noqa: BLE001
        return row | {"peer": "wrong", "peer_why": f"{type(error).__name__}: {error}"}
    if after != shapes:
        return row | {"peer": "wrong", "peer_why": "output shapes differ"}
    if row["peer_macs_left"] >= 1:
        return row | {"peer_why": "nothing was pruned"}
    return row | {"peer": "ok"}


def prune_speedup(model: nn.Module, example: Example) -> Row:
    """Plan -> new network, against copying the network and the peer's step; three times in turn."""
    graph = trace(model, *example)
    plan = uniform_plan(graph, 0.5, model=model)
    times = []
    for _ in range(3):
        mine, _pruned = timed(lambda: prune(model, graph, plan))
        copying, victim = timed(lambda: copy.deepcopy(model))
        pruner = peer_pruner(victim, example)
        times.append((copying + timed(pruner.step)[0]) / mine)
    return {"prune_speedup": statistics.median(times)}


def peak_memory(model: nn.Module, example: Example, run: Callable[[], Any]) -> int:
    """Bytes of resident memory at the highest, while something runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    run()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(source: str, name: str, connection: Any) -> None:
    """Peak memory of model and trace over model and forward pass, without what the interpreter had before."""
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    model, example = build(source, name)
    with torch.no_grad():
        forward = peak_memory(model, example, lambda: model(*example))
    trace = peak_memory(model, example, lambda: trace(model, *example))
    connection.send({"trace_memory_ratio": (trace - before) / (forward - before)})
    os._exit(0)


def heads(model: nn.Module) -> list[nn.Module]:
    """Layers that make a network's outputs: classifiers by their number of classes, detection heads whole."""
    found = [
        m
        for m in model.modules()
        if getattr(m, "out_features", getattr(m, "out_channels", None)) in (1000, 400, 91, 21)
    ]
    for name in ("head", "rpn", "roi_heads"):
        if hasattr(model, "transform") and isinstance(part := getattr(model, name, None), nn.Module):
            found += [m for m in part.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return found


def child(source: str, name: str, peer: bool, connection: Any) -> None:
    """One network; every finished part is sent at once, so that a time limit keeps what was done."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, example = build(source, name)
    connection.send(ours(model, example))
    if peer:
        if name == "resnet50":
            connection.send(prune_speedup(model, example))
        connection.send({"peer": "refused", "peer_why": "not finished within the limit"})
        connection.send(peers(model, example))
    connection.close()
    os._exit(0)


def in_process(target: Callable[..., None], arguments: tuple[Any, ...], limits: Sequence[float]) -> Row:
    """What a function sends from a fork; each part has a time limit, the last one holds for all that follow."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, send))
    process.start()
    send.close()
    row: Row = {}
    waits = iter(limits)
    limit = next(waits)
    try:
        while receive.poll(limit):
            row |= receive.recv()
            limit = next(waits, limit)
    except EOFError:
        process.join()
        if process.exitcode:
            row["why"] = f"the process ended with {process.exitcode}"
    else:
        row.setdefault("why", "not finished within the limit")
    process.kill()
    process.join()
    return row


MEMORY = ("resnet50", "densenet201", "swin_t", "ssdlite320_mobilenet_v3_large")
BARE = tuple("status name groups error frozen_macs macs_left forward_s trace_s prune_s why peer peer_s".split())


def share(rows: Sequence[Row], status: str = "ok", key: str = "status") -> float:
    return sum(row.get(key) == status for row in rows) / max(1, len(rows))


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """The figures that these rows allow."""
    tv, timm = ([row for row in rows if row["source"] == source] for source in ("torchvision", "timm"))
    tasks = [row for row in tv if row["name"].startswith((*DETECTION, *SEGMENTATION))]
    found: list[Figure] = []

    def add(name: str, value: float, bound: float, ok: bool) -> None:
        found.append(Figure(name, value, bound, ok))

    for source, some, bound in (("torchvision", tv, 0.97), ("timm", timm, 0.9)):
        if some:
            wrong = sum(row["status"] == "wrong" for row in some)
            add(f"{source}_ok_share", share(some), bound, share(some) >= bound)
            add(f"{source}_wrong", wrong, 0, wrong == 0)
            if any("peer" in row for row in some):
                add(f"{source}_ok_share_of_torch_pruning", share(some, key="peer"), 0, True)
    for zoo in dict.fromkeys(row["source"] for row in rows if row["source"] in ZOOS):
        some = [row for row in rows if row["source"] == zoo]
        free = sum(row["status"] == "ok" and row["frozen_macs"] < 0.5 for row in some) / len(some)
        wrong = sum(row["status"] == "wrong" for row in some)
        add(f"{zoo}_ok_with_under_half_frozen", free, 0.95, free >= 0.95)
        add(f"{zoo}_wrong", wrong, 0, wrong == 0)
    if tasks:
        add("detection_and_segmentation_ok_share", share(tasks), 1, share(tasks) == 1)
    traced = [row for row in rows if "trace_s" in row]
    for source in (None, *dict.fromkeys(row["source"] for row in traced)):
        ratios = [row["trace_s"] / row["forward_s"] for row in traced if source in (None, row["source"])]
        over = statistics.median(ratios or [float("nan")])
        add("trace_over_forward_median" + (f"_{source}" if source else ""), over, 2, over <= 2)
    late = sum(row["trace_s"] > 5 * row["forward_s"] + 1 for row in traced)
    add("traces_above_5_forwards_and_1_s", late, 0, late == 0)
    both = [row for row in rows if row["status"] == row.get("peer") == "ok"]
    if both:
        gain = statistics.median(row["peer_s"] / (row["trace_s"] + row["prune_s"]) for row in both)
        add("speedup_vs_torch_pruning", gain, 3, gain >= 3)
    for row in rows:
        if "prune_speedup" in row:
            add("prune_speedup", row["prune_speedup"], 2, row["prune_speedup"] >= 2)
    ratios = [row["trace_memory_ratio"] for row in rows if "trace_memory_ratio" in row]
    if ratios:
        add("trace_memory_ratio", max(ratios), 1.5, max(ratios) < 1.5)
    return found


def write(path: Path, rows: Sequence[Row], figures: Sequence[Figure], command: str) -> None:
    """The tables as Markdown."""
    lines = [
        "# Coverage",
        "",
        f"Written by `{command}` (torch {torch.__version__}, one thread per network).",
        "Half of the channels of every group are removed at random. What ok, wrong and refused mean, and what is asked",
        "of the peer, is said at the top of `benchmarks/coverage.py`. `error` is the certificate's relative error,",
        "`trace` the time of tracing over one forward pass of the same input, `MACs` the share that is left. Weights",
        "are random: nothing is said about accuracy.",
        "",
        "| figure | value | bound | |",
        "|---|---|---|---|",
        *(f"| `{f.name}` | {f.value:.4g} | {f.bound:g} | {'ok' if f.ok else '**missed**'} |" for f in figures),
    ]
    header = ["network", "result", "groups", "error", "MACs", "forward s", "trace", "prune s"]
    with_peer = any("peer" in row for row in rows)
    header += ["Torch-Pruning", "its MACs", "its time over ours"] if with_peer else []
    for source in dict.fromkeys(row["source"] for row in rows):
        lines += ["", f"## {source}", "", f"| {' | '.join(header)} | why not |", "|" + "---|" * (len(header) + 1)]
        lines += [_line(row, with_peer) for row in rows if row["source"] == source]
    path.write_text("\n".join(lines) + "\n")


def _line(row: Row, with_peer: bool) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    trace = f"{row['trace_s'] / row['forward_s']:.1f}x" if "trace_s" in row else ""
    cells = [row["name"], row["status"], str(row.get("groups", "")), number("error", ".1e"), number("macs_left", ".0%")]
    cells += [number("forward_s", ".3f"), trace, number("prune_s", ".2f")]
    if with_peer:
        ran = row["status"] == row.get("peer") == "ok"
        gain = f"{row['peer_s'] / (row['trace_s'] + row['prune_s']):.1f}x" if ran else ""
        cells += [row.get("peer", ""), number("peer_macs_left", ".0%"), gain]
    why = row.get("why", "") if row["status"] != "ok" else row.get("peer_why", "") and f"peer: {row['peer_why']}"
    if row["status"] == "ok" and row.get("frozen_macs", 0) >= 0.5:
        why = f"{row['frozen_macs']:.0%} frozen: {row['frozen_why']}"
    return f"| {' | '.join(cells)} | {' '.join(why.split())[:120].replace('|', '/')} |"


def warm_up() -> None:
    """What torch loads on first use is not part of anybody's time."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(16, 8), layer, nn.Linear(8, 2)
    )
    example = torch.randn(1, 3, 4, 4)
    graph = trace(model.eval(), example)
    prune(model, graph, uniform_plan(graph, 0.5, saliency="random"))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--timm", action="store_true", help="one network of each timm family as well")
    arguments.add_argument("--zoo", action="append", default=[], choices=ZOOS, help="another package's networks")
    arguments.add_argument("--no-torchvision", action="store_true", help="leave torchvision out")
    arguments.add_argument("--peer", choices=["torch-pruning"], help="measure it too, in the same processes")
    arguments.add_argument("--only", default="", metavar="REGEX", help="names to run")
    arguments.add_argument("--limit", type=float, default=200, metavar="SECONDS", help="per network (default 200)")
    arguments.add_argument("--peer-limit", type=float, default=100, metavar="SECONDS", help="the peer's (default 100)")
    arguments.add_argument("--jobs", type=int, default=1, help="networks at a time (default 1; more disturb timings)")
    arguments.add_argument("--write", type=Path, metavar="PATH", help="write the tables as Markdown")
    options = arguments.parse_args()
    jobs = [] if options.no_torchvision or options.zoo else [("torchvision", name) for name in torchvision_names()]
    jobs += [("timm", name) for name in TIMM] if options.timm else []
    jobs += [(zoo, name) for zoo in options.zoo for name in ZOOS[zoo][1]]
    jobs = [(source, name) for source, name in jobs if re.search(options.only, name)]
    torch.set_num_threads(1)
    for zoo in options.zoo:
        importlib.import_module(ZOOS[zoo][0])
    if options.timm:
        import timm  # noqa: F401 - before the forks
    if options.peer:
        import torch_pruning  # noqa: F401
    warm_up()
    gc.freeze()  # a collection in a fork would look through all that torch has loaded, and copy it

    def run(job: tuple[str, str]) -> Row:
        limits = (options.limit, options.peer_limit)
        row: Row = dict(zip(("source", "name"), job, strict=True)) | {"status": "refused"}
        row |= in_process(child, (*job, bool(options.peer)), limits)
        if job[1] in MEMORY:
            row |= in_process(memory, job, limits)
        cells = (f"{row[k]:.3g}" if isinstance(row.get(k), float) else str(row.get(k, "-"))[:200] for k in BARE)
        print(*cells, sep="  ", flush=True)
        rows[job] = row
        if options.json:  # a run that is killed has lost the networks it was at
            found = [rows[job] for job in jobs if job in rows]
            content = {"figures": [asdict(f) for f in figures_of(found)], "rows": found}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
        return row

    rows: dict[tuple[str, str], Row] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(run, jobs))
    figures = figures_of(done)
    present(f"coverage; torch {torch.__version__}", [{k: row.get(k, "") for k in BARE} for row in done], figures, None)
    if options.write:
        write(options.write, done, figures, " ".join(["python benchmarks/coverage.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
