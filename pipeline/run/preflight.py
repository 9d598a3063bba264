"""What will fail, known before anything is trained: everything at once, each with its fix.

``secateur validate`` and the start of every run ask the same function. It opens what the run file names, runs the
network once, finds its channel groups, and compares what is asked for with what there is. Nothing is trained, no device
is reached, and nothing is written but caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from secateur.device_profiles.profile import DeviceProfile
from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.choices import method_options
from secateur.pipeline.config.faults import Fault, FaultsError
from secateur.pipeline.config.schema import ExportSection, Recipe, RunFile, SearchSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.run.opening import (
    check_forward,
    check_precisions,
    check_quantise,
    compute_device,
    device_profiles,
    head_prefixes_of,
    known_steps,
    least_budget,
    make_problem,
    open_workload,
    search_space,
    search_spaces,
    trace_network,
)
from secateur.pipeline.run.proof import prove
from secateur.pipeline.surroundings import home
from secateur.pipeline.tracking.check import check_tracking
from secateur.pipeline.training.batches import check_mixing
from secateur.pipeline.training.distributed import check_count
from secateur.pipeline.training.synchronised import check_norms, check_synchronised
from secateur.pipeline.workloads import DataSummary, Workload
from secateur.pipeline.workloads.data.content import Reading
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import Cost, cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Budget, Evaluation
from secateur.pruning.search.scope import Spaces

BYTES_PER_PARAM = 4
"""Of the fp32 files that are exported."""
Place = tuple[str | int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """The unpruned network, and how small it can become.

    Args:
        input: shape of one input.
        graph: its channel groups.
        spaces: the widths a search may choose from, by what is known of the devices without reaching them.
        whole: its cost.
        smallest: the cost of the smallest plan of ``space``.
        bound: no plan costs less, whatever a probe of the devices finds.
        steps: where the widths of ``space`` come from.
        probed: whether the devices' probes are known already.
    """

    input: tuple[int, ...]
    graph: ChannelGraph
    spaces: Spaces
    whole: Cost
    smallest: Cost
    bound: Cost
    steps: str
    probed: bool

    @property
    def space(self) -> SearchSpace:
        """Every group that a search could cut."""
        return self.spaces.whole

    @property
    def frozen_share(self) -> float:
        """Fraction of the MACs in layers whose output channels no plan removes."""
        return sum({frozen.layer: frozen.macs_share for frozen in self.graph.frozen}.values())


@dataclass
class Preflight:
    """What is known of a run before it begins.

    Args:
        config: the run file.
        faults: what will fail; a run with any does not begin.
        notes: what its user should know.
        profiles: the devices' profiles; None where one cannot be used, and so on.
    """

    config: RunFile
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    profiles: tuple[DeviceProfile, ...] | None = None
    compute: torch.device | None = None
    workload: Workload | None = None
    data: DataSummary | None = None
    network: Network | None = None

    def require(self, name: str) -> tuple[tuple[DeviceProfile, ...], torch.device, Workload]:
        """The parts of a run that can begin.

        Args:
            name: of the run file, as a user knows it.

        Raises:
            FaultsError: it cannot; lists every fault.
        """
        if self.faults or self.profiles is None or self.compute is None or self.workload is None:
            raise FaultsError(name, self.faults)
        return self.profiles, self.compute, self.workload

    def attempt(self, place: Place, work: Callable[[], T]) -> T | None:
        """What ``work`` returns; where a user's mistake stops it, that is a fault at ``place``, and None."""
        try:
            return work()
        except FaultsError as error:
            self.faults += error.faults
        except UserError as error:
            self.faults.append(Fault(place, str(error)))
        return None


def examine(
    config: RunFile,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    *,
    begun: bool = False,
    tracking: bool = False,
    whole: bool = False,
) -> Preflight:
    """Find what will fail.

    Args:
        reading: how thoroughly image files are looked at.
        begun: the run has begun already, so that what the run file asks for was found possible.
        tracking: whether MLflow is asked too (a run asks it by itself, and waits for a server that is unreachable).
        whole: whether the data is read where there are faults already, to find all at once; else they are told first.
    """
    found = Preflight(config)
    found.profiles = found.attempt(("device",), lambda: device_profiles(config))
    found.attempt(("precision",), lambda: check_precisions(config))
    found.attempt(("finetune", "quantise"), lambda: check_quantise(config))
    found.compute = found.attempt(("compute",), lambda: compute_device(config.compute))
    if (compute := found.compute) is not None:
        found.attempt(("compute_count",), lambda: check_count(config.compute_count, compute))
        for name, recipe in recipes(config):
            found.attempt((name, "sync_batchnorm"), partial(check_synchronised, recipe, compute, config.compute_count))
    if tracking:
        report = check_tracking(config, home())
        found.faults += [Fault(("tracking",), message) for message in report.faults]
        found.notes += report.notes
    if found.faults and not whole:
        return found
    workload = found.workload = found.attempt(("workload",), lambda: open_workload(config, reading))
    if workload is None:
        return found
    if not begun:
        _check_images(found, workload)
        for name, recipe in recipes(config):
            found.attempt((name,), partial(check_mixing, workload, recipe))
    example = workload.example_input()
    model = found.attempt(("workload", "model"), workload.build_model)
    if model is not None:
        found.notes += workload.notes  # also of the weights, which can be read
    if model is None or found.attempt(("workload",), lambda: check_forward(model, example)) is None:
        return found
    if begun:
        return found
    for name, recipe in recipes(config):
        if recipe.sync_batchnorm:
            found.attempt((name, "sync_batchnorm"), partial(check_norms, model))
    found.data = workload.summary()
    found.network = found.attempt(("search",), lambda: _network(found, model, example))
    if found.network is not None:
        _check_targets(found, found.network)
        _check_budget(found, workload, found.network)
        space, graph = found.network.space, found.network.graph
        found.attempt(("search",), lambda: prove(model, graph, space, example, config.seed))
    return found


def recipes(config: RunFile) -> tuple[tuple[str, Recipe], ...]:
    """The recipes of a run file, by their sections."""
    return ("baseline", config.baseline), ("finetune", config.finetune)


def _network(found: Preflight, model: torch.nn.Module, example: torch.Tensor) -> Network:
    config, graph = found.config, trace_network(model, example)
    steps, probed = known_steps(found.profiles or (), config.ships)
    spaces = search_spaces(config, graph, steps, head_prefixes_of(model))
    finest = search_space(config, graph, 1)
    if config.search.channel_multiple is not None:
        origin = "search.channel_multiple"
    elif config.device.channel_multiple is not None:
        origin = "device.channel_multiple"
    else:
        origin = "a kept probe of the device" if probed else "the device profile, unprobed"
    plans = (PruningPlan.full(graph.groups), spaces.whole.smallest(), finest.smallest())
    whole, smallest, bound = (cost(graph, plan) for plan in plans)
    return Network(tuple(example.shape), graph, spaces, whole, smallest, bound, origin, probed)


def _check_images(found: Preflight, workload: Workload) -> None:
    """Compare the images asked for with those there are; a default takes what there is."""
    search, export = found.config.search, found.config.export
    train, held_out = ("train", len(workload.train)), ("search", len(workload.search))
    asked = (
        (("search", "images"), search.images, SearchSection().images, held_out),
        (("search", "recalibrate_images"), search.recalibrate_images or 0, 0, train),
        (("export", "parity_images"), export.parity_images, ExportSection().parity_images, held_out),
    )
    for place, wanted, default, (split, there) in asked:
        name = ".".join(place)
        if wanted > there and wanted != default:
            message = (
                f"{number_of(wanted, 'image(s)')}, and the {split} split has {there:,}; set {name}: {there} or less"
            )
            found.faults.append(Fault(place, message))
        elif wanted > there:
            found.notes.append(
                f"{name} is {wanted:,}, the {split} split has {number_of(there, 'image(s)')}: all are used"
            )


def _check_budget(found: Preflight, workload: Workload, network: Network) -> None:
    """See that the search's budget holds one round of its method; of work, the least that it can take."""
    search, whole = found.config.search, network.whole
    dense = Evaluation(metrics={"macs": float(whole.macs), "params": float(whole.params), workload.search_metric: 1.0})
    rewards = lambda evaluation: 0.0  # noqa: E731 - nothing is evaluated
    problem = make_problem(found.config, network.graph, network.space, dense, rewards, workload.search_metric)
    images, kept = min(search.images, len(workload.search)), search.target.macs_ratio or 0.0

    def lacking(least: Budget) -> dict[str, tuple[float, float]]:
        """Kind -> what there is and what it takes, of those that do not suffice."""
        seen = images * (least.evaluations or 0) + 3 * len(workload.train) * (least.epochs or 0.0)
        takes = {"evaluations": least.evaluations, "epochs": least.epochs, "seconds": least.seconds}
        takes["work"] = max(least.work or 0.0, seen * kept * whole.macs)
        there = {name: getattr(search.budget, name) for name in takes}
        return {n: (there[n], take) for n, take in takes.items() if take and there[n] is not None and there[n] < take}

    short = lacking(least_budget(search.method, problem, method_options(search)))
    if not short:
        return
    defaults = {name: module.Options() for name, module in METHODS.loaded().items() if name != search.method}
    holds = [name for name, options in defaults.items() if not lacking(least_budget(name, problem, options))]
    way = f"take a method that it holds: {', '.join(holds)}" if holds else "no method takes less"
    for kind, (there, takes) in short.items():
        message = f"{there:g} cannot hold one round of {search.method}, whose least is {takes:g}; raise it, or {way}"
        found.faults.append(Fault(("search", "budget", kind), message))


def _check_targets(found: Preflight, network: Network) -> None:
    """Compare what is asked for with the smallest network that can be reached."""
    config, way = found.config, "lower search.min_keep_ratio, freeze less, or start from a smaller network"
    least, likely = network.bound.macs / network.whole.macs, network.smallest.macs / network.whole.macs
    ratios = (
        (("search", "target", "macs_ratio"), config.search.target.macs_ratio),
        (("gate", "max_macs_ratio"), config.gate.max_macs_ratio),
    )
    for place, wanted in ratios:
        if wanted is not None and wanted < least:
            message = f"{wanted:g} cannot be met: the smallest reachable is {least:.3f}; raise it, {way}"
            found.faults.append(Fault(place, message))
        elif wanted is not None and wanted < likely:
            found.notes.append(
                f"{'.'.join(place)} {wanted:g} may be out of reach: with the widths of {network.steps} the smallest "
                f"reachable is {likely:.3f}"
            )
    for profile in (found.profiles or ()) if config.gate.budgets else ():
        limit, size = profile.budgets.size_bytes, network.bound.params * BYTES_PER_PARAM
        if limit is not None and limit < size:
            message = (
                f"budget size_bytes {limit:,} of {profile.name} cannot be met: the smallest network has {size:,} bytes "
                f"of weights; raise the budget, set gate.budgets: false, {way}"
            )
            found.faults.append(Fault(("device", "profile"), message))
