"""How long a run takes and how much memory, before it begins: its work is counted, and a few steps of it are timed.

What a search will ask for is counted by ``rehearsal``. Times are those of this machine with nothing else to do.
Nothing is left behind: no file, no weights, no random numbers drawn.
"""

from __future__ import annotations

import contextlib
import math
import random
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from secateur.device_profiles.cores import usable_cores
from secateur.device_profiles.profile import DeviceProfile
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run.network_probe import probe_seconds
from secateur.pipeline.run.opening import spared_the_probe
from secateur.pipeline.run.preflight import Network, Preflight
from secateur.pipeline.run.rehearsal import Counted, Work, rehearse, share
from secateur.pipeline.run.widths import probed_in
from secateur.pipeline.training.precision import likely
from secateur.pipeline.workloads import Workload
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.scope import Spaces
from secateur.pruning.surgery import prune

SLOW_STEP = 0.2
"""CPU-seconds of one image, forward, above which a training step is not run but taken as ``TRAIN_OVER_FORWARD``."""
SPENT_ON_A_STEP = 0.05
"""CPU-seconds that the forward pass of a timed batch may take; the batch is made no larger."""
TRAIN_OVER_FORWARD = 3.0
"""A step's time, forward and backward, to that of the forward pass alone: the backward one has two products of each."""
SCORED_OVER_FORWARD = 0.4
"""A candidate's images by the fastest forward pass (``secateur.pipeline.evaluation.inference``) to those by the plain
one."""
REPEATS = 2


class Seconds(NamedTuple):
    """Wall time and CPU time."""

    wall: float
    cpu: float

    def times(self, count: float) -> Seconds:
        return Seconds(count * self.wall, count * self.cpu)

    def faster(self, ratio: float) -> Seconds:
        """The same work in this ratio of the wall time: by more threads."""
        return Seconds(ratio * self.wall, self.cpu)


START = Seconds(14.0, 14.0)
"""Imports, the scheduler's own server and the tracking store's tables, at the start of a run."""
TEMPLATE = Seconds(5.0, 5.0)
"""The first ONNX export of a process, which is most of what it takes; for the search, and for the final files."""
EXPORT = Seconds(2.0, 2.0)
"""A further export, with its optimisation."""
REGISTER = Seconds(4.0, 4.0)
"""Report, registry, and what they import."""
PROBE = Seconds(30.0, 30.0)
"""The probe of a device that was never probed."""
PROCESS = Seconds(1.2, 1.2)
"""A measuring process: its start, loading the models, and calls until they are steady."""
LOOK = Seconds(0.03, 0.03)
"""Finding the fastest forward pass of a pruned network, beside cutting it."""
LIBRARIES = 600 << 20
"""Bytes that a run's other libraries take: exporting, tracking and scheduling."""


@dataclass(frozen=True)
class Part:
    """What one stage takes.

    Args:
        stage: as progress calls it.
        seconds: wall time.
        cpu_seconds: of all threads and processes.
    """

    stage: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run takes on this machine.

    Args:
        parts: its stages, in order.
        memory: what lies in the run's memory at once, at most -> bytes.
        counted: what the search will ask for.
        work: how often each step is taken, in the whole run.
    """

    parts: tuple[Part, ...]
    memory: Mapping[str, int]
    counted: Counted
    work: Work

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def cpu_seconds(self) -> float:
        return sum(part.cpu_seconds for part in self.parts)

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Steps:
    """What was timed: single steps of the unpruned network.

    Args:
        forward: one image in evaluation mode.
        train: one image of a training step, its preparation included.
        cut: cutting a network out of the unpruned one.
        saved_bytes: activations that one image of a training step keeps for the backward pass.
    """

    forward: Seconds
    train: Seconds
    cut: Seconds
    saved_bytes: float


def estimate(found: Preflight) -> Estimate | None:
    """What a run will take; None where it cannot begin.

    Args:
        found: what is known of the run.
    """
    if found.faults or found.profiles is None or found.workload is None or found.network is None:
        return None
    config, workload, network = found.config, found.workload, found.network
    resident, compute = _resident_bytes(), found.compute or torch.device("cpu")
    steps, prices, counted = _rehearsed(config, found.profiles, workload, network.graph, network.spaces, compute)
    prices["network_probes"] = Seconds(*[probe_seconds(_seconds(counted.work, prices).wall)] * 2)
    stages = count(found, workload, network, counted)
    parts = tuple(Part(stage, *_seconds(work, prices)) for stage, work in stages.items())
    memory = _memory(config, network, steps, resident, pretrained=workload.pretrained)
    whole: Work = defaultdict(float)
    for work in stages.values():
        for step, num in work.items():
            whole[step] += num
    return Estimate(parts, memory, counted, whole)


def search_seconds(
    config: RunFile,
    profiles: Sequence[DeviceProfile],
    workload: Workload,
    graph: ChannelGraph,
    spaces: Spaces,
    compute: torch.device,
) -> float:
    """What the search of a run will take, without probes."""
    _, prices, counted = _rehearsed(config, profiles, workload, graph, spaces, compute)
    return _seconds(counted.work, prices).wall


def _seconds(work: Work, prices: Mapping[str, Seconds]) -> Seconds:
    """What work takes."""
    return Seconds(
        sum(prices[step].wall * num for step, num in work.items()),
        sum(prices[step].cpu * num for step, num in work.items()),
    )


def _rehearsed(
    config: RunFile,
    profiles: Sequence[DeviceProfile],
    workload: Workload,
    graph: ChannelGraph,
    spaces: Spaces,
    compute: torch.device,
) -> tuple[Steps, dict[str, Seconds], Counted]:
    """What was timed, what each step of ``Work`` takes (a probe of the network aside), and what a search asks for."""
    with _as_before(config.threads or usable_cores()):
        model = workload.build_model().to(compute).eval()
        steps = _timed_steps(config, workload, graph, spaces.whole, model, compute)
    searching = [_process(p, "search", steps.forward.wall).times(p.search.processes) for p in profiles]
    timing = [_process(p, "final", steps.forward.wall) for p in profiles]
    prices: dict[str, Seconds] = {
        "images_trained": steps.train,
        "images_taught": steps.forward,
        "images_forwarded": steps.forward,
        "images_scored": steps.forward.times(SCORED_OVER_FORWARD),
        "networks": Seconds(steps.cut.wall + LOOK.wall, steps.cut.cpu + LOOK.cpu),
        "measurements": max(searching),  # devices measure side by side
        "timings": max(timing),
        "exports": EXPORT,
        "starts": START,
        "templates": TEMPLATE,
        "registrations": REGISTER,
        "probes": PROBE,
    }
    num_scored = min(config.search.images, len(workload.search))
    counted = rehearse(
        config,
        graph,
        spaces,
        (len(workload.train), num_scored),
        (workload.metric, workload.search_metric),
        {name: price.wall for name, price in prices.items()},
    )
    return steps, prices, counted


def count(found: Preflight, workload: Workload, network: Network, counted: Counted) -> dict[str, Work]:
    """How often each stage of a run takes each step; stages as ``secateur.pipeline.stages`` has them, and the start."""
    config, profiles = found.config, found.profiles or ()
    num_train, num_scored = len(workload.train), min(config.search.images, len(workload.search))
    probing = config.device.probe and config.device.channel_multiple is None and not network.probed
    num_probes = len(probed_in(config.ships)) if probing else 0
    timed = not spared_the_probe(config)
    tuning: Work = defaultdict(float)
    for ratio in counted.finals:
        images = config.finetune.epochs * num_train
        tuning["images_trained"] += images * share(ratio)
        tuning["images_taught"] += images if config.finetune.distill else 0
        tuning["images_forwarded"] += num_scored * share(ratio)
        tuning["networks"] += 1
        tuning["measurements"] += 1
    smaller = share(counted.finals[0])
    if config.report.control != "none":  # scored beside the chosen plan, which is timed by then
        tuning["images_forwarded"] += 2 * num_scored * smaller
        tuning["networks"] += 2
        tuning["measurements"] += 1
    parity, checks = min(config.export.parity_images, len(workload.search)), 2  # by PyTorch and by ONNX Runtime
    files = 1 if workload.postprocessing is None else 2
    epochs = 0.0 if workload.pretrained else config.baseline.epochs
    return {
        "Start": {"starts": 1},
        "Baseline": {"images_trained": epochs * num_train},
        "Search": {**counted.work, "templates": 1, "probes": num_probes, "network_probes": int(timed)},
        "Fine-tune": tuning,
        "Export": {"templates": 1, "exports": 1, "images_forwarded": checks * parity * (1 + smaller)},
        "Benchmark": {"timings": files * max((profile.final.processes for profile in profiles), default=0)},
        "Gate": {"images_forwarded": len(workload.test) * (1 + smaller)},
        "Report and register": {"registrations": 1},
    }


# -- what is timed -----------------------------------------------------------------------------------------------------


def _timed_steps(
    config: RunFile,
    workload: Workload,
    graph: ChannelGraph,
    space: SearchSpace,
    model: nn.Module,
    compute: torch.device,
) -> Steps:
    """Time a few steps of a network; its statistics change, so it must be nobody else's.

    On a CPU by the CPU time of one thread, which other load hardly touches; more threads count by what they save.
    """
    recipe, generator = config.finetune, torch.Generator().manual_seed(0)
    half = {name: range(widths[len(widths) // 2]) for name, widths in space.allowed.items()}
    plan = PruningPlan.full(graph.groups).replace(half)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cut = timed(lambda: prune(model, graph, plan), compute)
    model.to(memory_format=torch.channels_last)

    def batch(num: int, *, train: bool) -> tuple[Tensor, Tensor]:
        split, indices = workload.train if train else workload.search, torch.arange(num)
        return workload.batch(split, indices, train=train, generator=generator, device=compute)

    def forward(num: int) -> None:
        with torch.inference_mode():
            model(batch(num, train=False)[0])

    forward(1)
    one = timed(lambda: forward(1), compute)
    num = int(min(recipe.batch_size, max(1, SPENT_ON_A_STEP // one.cpu), len(workload.search), len(workload.train)))
    evaluated = one
    if num > 1:
        forward(num)  # what is prepared for a batch of this size is prepared once
        evaluated = timed(lambda: forward(num), compute).times(1 / num)
    saved_by = 1.0
    if compute.type == "cpu" and threads > 1 and one.cpu < SLOW_STEP:
        torch.set_num_threads(threads)
        together = min(_wall(lambda: forward(num)) for _ in range(REPEATS)) / num
        saved_by = min(1.0, together / evaluated.wall)
        torch.set_num_threads(1)
    if one.cpu >= SLOW_STEP:
        saved = float(cost(graph, PruningPlan.full(graph.groups)).activation_bytes)
        trained = evaluated.times(TRAIN_OVER_FORWARD)
    else:
        saved, trained = _timed_training(config, workload, model, compute, batch, num)
    return Steps(evaluated.faster(saved_by), trained.faster(saved_by), cut, saved)


def _timed_training(
    config: RunFile,
    workload: Workload,
    model: nn.Module,
    compute: torch.device,
    batch: Callable[..., tuple[Tensor, Tensor]],
    num: int,
) -> tuple[float, Seconds]:
    """Of one image of a training step: bytes kept for the backward pass, and time."""
    recipe, kept = config.finetune, {parameter.data_ptr(): 0 for parameter in model.parameters()}
    bf16 = likely(recipe, model, workload, compute) == "bf16"
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    def train() -> None:
        images, targets = batch(num, train=True)
        with torch.autocast(compute.type, torch.bfloat16, enabled=bf16):
            loss = workload.loss(model(images), targets, recipe.label_smoothing)
        torch.autograd.grad(loss, learned, allow_unused=True)  # an optimiser would import PyTorch's compiler

    model.train()
    num = max(2, num)  # batch norm needs two
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train()
    return sum(kept.values()) / num, timed(train, compute).times(1 / num)


def timed(work: Callable[[], Any], compute: torch.device) -> Seconds:
    """What a call takes; on a CPU, where one thread computes, its CPU time is both."""
    cpu = time.process_time()
    wall = _wall(work)
    cpu = max(1e-9, time.process_time() - cpu)
    return Seconds(cpu if compute.type == "cpu" else wall, cpu)


def _wall(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextlib.contextmanager
def _as_before(threads: int) -> Iterator[None]:
    """PyTorch on so many threads, and afterwards all as it was: threads and every random generator."""
    before, python, arrays = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)
        random.setstate(python)
        np.random.set_state(arrays)


def _process(profile: DeviceProfile, tier: Literal["search", "final"], call_s: float) -> Seconds:
    """One measuring process, which times two models in turn."""
    rules = profile.tier(tier)
    calls = min(rules.max_seconds, max(rules.min_seconds, 2 * rules.min_repeats * call_s))
    warm = min(rules.max_warmup_seconds, 2 * rules.warmup * call_s)
    took = PROCESS.wall + warm + calls
    return Seconds(took + (profile.cool_down_s if tier == "final" else 0), took)


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(config: RunFile, network: Network, steps: Steps, resident: int, *, pretrained: bool) -> dict[str, int]:
    """What lies in a run's memory when it trains, in bytes."""
    copies = 4 + (1 if config.finetune.distill else 0) + (1 if config.finetune.ema else 0)
    whole = cost(network.graph, PruningPlan.full(network.graph.groups))
    batch = max(config.finetune.batch_size, 0 if pretrained else config.baseline.batch_size)
    scored = min(config.search.memory_mb << 20, config.search.images * whole.activation_bytes)
    return {
        "process": resident + LIBRARIES,
        "weights": copies * 4 * whole.params,
        "activations": max(math.ceil(batch * steps.saved_bytes), scored),
    }


def _resident_bytes() -> int:
    """Memory of this process now, the data set in it included."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
