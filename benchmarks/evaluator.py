"""Candidates per second of the evaluator's inference against the straightforward loop, on ResNet-56 and CIFAR-10.

    SECATEUR_DATA=FOLDER python benchmarks/evaluator.py [--images 1000] [--candidates 3] [--threads 1] [--json PATH]

The straightforward loop is what a user of Torch-Pruning writes: a deep copy, a dependency graph, the same channels
pruned, and the copy run in PyTorch on batches of 250. Both get the same plans and the same images and run in turn in
one process; their outputs are compared. Plans cut the inner widths of the residual blocks, whose channels both tools
remove alike. With one thread the times are CPU times, otherwise wall times.

`ccep_speedup`: plans that differ from the unpruned network in one group, for five groups from the first block to the
last: total seconds of the loop over total seconds of ours. Setting up a group (its first two candidates take longer:
sessions are made and activations are kept) is shared by the 55 candidates that CCEP asks for (5 + 10 * 5), and choosing
the fastest way, with the export of the template, by the 55 of each group of one round.
`plan_speedup`: plans over all groups, each keeping 40 to 90 % of its channels, with the same share of that choice.
`error`: largest relative difference of outputs.

`limit_s` is the physical limit in float32: the multiplications that the candidate needs (for one group: from its
readers on), over what this machine does in a large matrix product in the same run. `times_limit` is ours over that.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from export.slicing import OnnxTemplate
from pipeline.inference import Inference
from pipeline.workloads.networks import build_network
from pruning import ChannelGraph, PruningPlan
from pruning.cost import cost
from pruning.surgery import relative_error

CCEP_SPEEDUP, PLAN_SPEEDUP, ERROR = 10.0, 6.0, 1e-4
PER_GROUP = 5 + 5 * 10
BATCH = 250
MATRIX = 2048


def load(num_images: int) -> tuple[nn.Module, list[Tensor]]:
    """The trained network and batches of normalised training images."""
    data = Path(os.environ["SECATEUR_DATA"])
    model = build_network("cifar_resnet56", 10, 3, {})
    model.load_state_dict(load_file(next(data.rglob("resnet56_cifar10.safetensors"))), strict=False)
    strips = sorted(next(data.rglob("cifar10/train_00.webp")).parent.glob("train_*.webp"))[: -(-num_images // 500)]
    pixels = np.concatenate([np.asarray(Image.open(p).convert("RGB")).reshape(-1, 32, 32, 3) for p in strips])
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    images = (torch.from_numpy(pixels[:num_images].copy()) / 255 - mean) / std
    return model.eval(), list(images.permute(0, 3, 1, 2).contiguous().split(BATCH))


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


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=1000, help="images per candidate (default 1000)")
    arguments.add_argument("--candidates", type=int, default=3, help="candidates per group, and plans (default 3)")
    arguments.add_argument("--threads", type=int, default=1, help="threads of both (default 1)")
    options = arguments.parse_args()
    if "SECATEUR_DATA" not in os.environ:
        sys.exit("set SECATEUR_DATA to the folder that holds resnet56_cifar10.safetensors and cifar10/")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter

    def timed(action: Callable[[], Any]) -> tuple[float, Any]:
        started = clock()
        result = action()
        return clock() - started, result

    model, batches = load(options.images)
    graph = ChannelGraph.trace(model, batches[0][:1])
    full = PruningPlan.full(graph.groups)
    inner = [group.name for group in graph.groups if group.name.endswith(".conv1")]
    ours = Inference(
        model,
        graph,
        lambda: batches,
        lambda: OnnxTemplate.export(model, batches[0][:1], graph),
        device=torch.device("cpu"),
        threads=options.threads,
        patience_s=0.0,
    )
    rng = np.random.default_rng(0)
    errors: list[float] = []

    def cut(names: list[str], least: float, most: float) -> PruningPlan:
        masks = {}
        for name in names:
            width = max(1, round(full.sizes[name] * rng.uniform(least, most)))
            masks[name] = np.sort(rng.permutation(full.sizes[name])[:width]).tolist()
        return full.replace(masks)

    def ours_s(plan: PruningPlan) -> tuple[float, Tensor]:
        return timed(lambda: torch.cat(list(ours.outputs(plan))))

    def both(plan: PruningPlan) -> tuple[float, float]:
        fast_s, found = ours_s(plan)
        slow_s, expected = timed(lambda: straightforward(model, plan, batches))
        errors.append(relative_error(found, expected))
        return fast_s, slow_s

    first_s, _ = ours_s(full)
    choice_s = first_s - ours_s(full)[0]
    shared_s = choice_s / (PER_GROUP * len(inner))
    a, b = torch.randn(2, MATRIX, MATRIX)
    rate = 0.0
    after = macs_after(model, batches[0][:1])
    rows: list[dict[str, Any]] = []

    def row(what: str, times: list[tuple[float, float]], setup_s: float, macs: float) -> None:
        nonlocal rate
        rate = max(rate, *(MATRIX**3 / timed(lambda: a @ b)[0] for _ in range(3)))
        fast_s, slow_s = np.mean(times, axis=0).tolist()
        fast_s += setup_s
        rows.append(
            {"candidates": what, "loop_s": slow_s, "ours_s": fast_s, "setup_s": setup_s, "speedup": slow_s / fast_s}
            | {"gmacs": macs * options.images / 1e9}
        )

    for i in np.linspace(0, len(inner) - 1, 5).round().astype(int):
        plans = [cut([inner[i]], 0.85, 0.95) for _ in range(2 + options.candidates)]
        early_s = sum(ours_s(plan)[0] for plan in plans[:2])
        times = [both(plan) for plan in plans[2:]]
        setup_s = max(0.0, early_s - 2 * float(np.mean([fast for fast, _ in times]))) / PER_GROUP + shared_s
        row(inner[i], times, setup_s, after[inner[i]])
    num_groups = len(rows)
    plans = [cut(inner, 0.4, 0.9) for _ in range(options.candidates)]
    row("all groups", [both(p) for p in plans], shared_s, float(np.mean([cost(graph, p).macs for p in plans])))
    for r in rows:
        r["limit_s"] = r.pop("gmacs") * 1e9 / rate
        r["times_limit"] = r["ours_s"] / r["limit_s"]
    groups, plan_row = rows[:num_groups], rows[-1]
    ccep = sum(r["loop_s"] for r in groups) / sum(r["ours_s"] for r in groups)
    figures = [
        Figure("ccep_speedup", ccep, CCEP_SPEEDUP, ccep >= CCEP_SPEEDUP),
        Figure("plan_speedup", plan_row["speedup"], PLAN_SPEEDUP, plan_row["speedup"] >= PLAN_SPEEDUP),
        Figure("error", max(errors), ERROR, max(errors) <= ERROR),
    ]
    most = sum(r["loop_s"] for r in groups) / sum(r["limit_s"] for r in groups)
    title = (
        f"ResNet-56, {options.images} images, torch {torch.__version__}, {options.threads} thread(s); matrix product "
    )
    title += (
        f"{rate / 1e9:.0f} GMAC/s, so at most {most:.2g} (one group) and {plan_row['loop_s'] / plan_row['limit_s']:.2g}"
    )
    title += f" (plans) are possible in float32; choosing a way took {choice_s:.0f} s\n{ours.describe()}"
    present(title, rows, figures, options.json)


if __name__ == "__main__":
    main()
