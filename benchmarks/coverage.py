"""Which networks can be pruned, proven right: every float network of torchvision, and one of each timm family.

    python benchmarks/coverage.py [--timm] [--peer torch-pruning] [--only REGEX] [--write PATH] [--json PATH]

Each network runs in a process of its own under a time limit, with random weights and one thread: trace, keep a random
half of the channels of every group, prune, certify against the masked network, compare `cost` with counting, and check
that gradients reach every parameter they reach in the dense network.

- ok: all of that holds, and something was pruned;
- wrong: a pruned network that fails, differs, or costs something else than `cost` said;
- refused: nothing can be pruned, or an error that says why.

The peer gets the same network, input and keep ratio in the same process, and its classifiers named as layers to leave
alone; it is ok if the pruned network runs, keeps its output shapes and has fewer MACs (no values are compared).
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import pruning.trial  # noqa: F401 - before the forks
from benchmarks._output import parser
from benchmarks._zoo import TIMM, build, torchvision_names
from pruning import ChannelGraph, certify, cost, prune, uniform_plan
from pruning.cost import count
from pruning.reference import masked_tensors
from pruning.tracer import named_tensors

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
        model(*copy.deepcopy(example))
        return statistics.median(timed(lambda: model(*example))[0] for _ in range(3))


def ours(model: nn.Module, example: Example) -> Row:
    """Trace, halve, prune, prove."""
    row: Row = {"status": "refused"}
    try:
        row["forward_s"] = forward_seconds(model, example)
        row["trace_s"], graph = timed(lambda: ChannelGraph.trace(model, *example))
    except Exception as error:  # noqa: BLE001 - the table says what happened
        return row | {"why": f"{type(error).__name__}: {error}"}
    row["groups"] = len(graph.groups)
    row["frozen_macs"] = sum({f.layer: f.macs_share for f in graph.frozen}.values())
    if not graph.groups:
        return row | {"why": "no channel group"}
    row["status"] = "wrong"
    try:
        plan = uniform_plan(graph, 0.5, saliency="random", seed=1)
        row["prune_s"], pruned = timed(lambda: prune(model, graph, plan))
        certificate = certify(model, pruned, graph, plan, *example)
        row["error"] = certificate.max_relative_error
        if "raised" in certificate.reason:
            return row | {"why": certificate.reason}
        predicted, counted = cost(graph, plan), count(pruned, *example)
        row["macs_left"] = predicted.macs / max(1, count(model, *example).macs)
        if not certificate.ok:
            return row | {"why": certificate.reason}
        if predicted != counted:  # the number of boxes follows the values: compare on those of the masked network
            masked = copy.deepcopy(model)
            masked.load_state_dict(masked_tensors(model, graph, plan), strict=False)
            predicted = cost(ChannelGraph.trace(masked, *example), plan)
            if abs(predicted.activation_bytes - counted.activation_bytes) < 1e-5 * counted.activation_bytes:
                predicted = replace(predicted, activation_bytes=counted.activation_bytes)  # a box more or less
        if predicted != counted:
            return row | {"why": f"cost {predicted} but counted {counted}"}
        if lost := gradients(model, example) - gradients(pruned, example):
            return row | {"why": f"no gradient for {sorted(lost)[:3]}"}
        row["status"] = "ok"
    except Exception as error:  # noqa: BLE001
        row["why"] = f"{type(error).__name__}: {error}"
    return row


def gradients(model: nn.Module, example: Example) -> set[str]:
    """Parameters that the outputs' gradients reach."""
    outputs = [t for _, t in named_tensors(model(*example)) if t.requires_grad]
    model.zero_grad(set_to_none=True)
    sum(t.sum() for t in outputs).backward() if outputs else None
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return reached


def peers(model: nn.Module, example: Example) -> Row:
    """The same with Torch-Pruning's magnitude pruner; the model is changed."""
    import torch_pruning as tp

    row: Row = {"peer": "refused"}
    shapes = {path: tuple(t.shape) for path, t in named_tensors(model(*example))}
    before = count(model, *example).macs
    start = time.perf_counter()
    try:
        pruner = tp.pruner.MagnitudePruner(
            model,
            example if len(example) == 1 else list(example),
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=heads(model),
        )
        row["peer_graph_s"] = time.perf_counter() - start
        pruner.step()
        row["peer_s"] = time.perf_counter() - start
    except Exception as error:  # noqa: BLE001
        return row | {"peer_why": f"{type(error).__name__}: {error}"}
    try:
        with torch.no_grad():
            after = {path: tuple(t.shape) for path, t in named_tensors(model(*example))}
        row["peer_macs_left"] = count(model, *example).macs / max(1, before)
    except Exception as error:  # noqa: BLE001
        return row | {"peer": "wrong", "peer_why": f"{type(error).__name__}: {error}"}
    if {p: s[1:] for p, s in after.items()} != {p: s[1:] for p, s in shapes.items()}:
        return row | {"peer": "wrong", "peer_why": "output shapes differ"}
    if row["peer_macs_left"] >= 1:
        return row | {"peer_why": "nothing was pruned"}
    return row | {"peer": "ok"}


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
        connection.send({"peer": "refused", "peer_why": "not finished within the limit"})
        connection.send(peers(model, example))
    connection.close()
    os._exit(0)


def measure(source: str, name: str, peer: bool, limit_s: float) -> Row:
    """A row for one network, run in a fork under a time limit."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(source, name, peer, send))
    process.start()
    send.close()
    row: Row = {"source": source, "name": name, "status": "refused"}
    deadline = time.monotonic() + limit_s
    try:
        while receive.poll(max(0.0, deadline - time.monotonic())):
            row |= receive.recv()
            deadline = time.monotonic() + limit_s
    except EOFError:
        process.join()
        if process.exitcode:
            row["why"] = f"the process ended with {process.exitcode}"
    else:
        row.setdefault("why", "not finished within the limit")
    process.kill()
    process.join()
    return row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--timm", action="store_true", help="one network of each timm family as well")
    arguments.add_argument("--no-torchvision", action="store_true", help="leave torchvision out")
    arguments.add_argument("--peer", choices=["torch-pruning"], help="measure it too, in the same processes")
    arguments.add_argument("--only", default="", metavar="REGEX", help="names to run")
    arguments.add_argument("--limit", type=float, default=100, metavar="SECONDS", help="per network (default 100)")
    arguments.add_argument("--jobs", type=int, default=1, help="networks at a time (default 1; more disturb timings)")
    options = arguments.parse_args()
    jobs = [] if options.no_torchvision else [("torchvision", name) for name in torchvision_names()]
    jobs += [("timm", name) for name in TIMM] if options.timm else []
    jobs = [(source, name) for source, name in jobs if re.search(options.only, name)]
    if options.timm:
        import timm  # noqa: F401 - before the forks
    if options.peer:
        import torch_pruning  # noqa: F401

    def run(job: tuple[str, str]) -> Row:
        row = measure(*job, bool(options.peer), options.limit)
        keys = (
            "status",
            "name",
            "groups",
            "error",
            "macs_left",
            "forward_s",
            "trace_s",
            "prune_s",
            "why",
            "peer",
            "peer_s",
        )
        print(
            *(f"{row[k]:.3g}" if isinstance(row.get(k), float) else str(row.get(k, "-"))[:300] for k in keys),
            sep="  ",
            flush=True,
        )
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(run, jobs))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
