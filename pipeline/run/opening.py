"""What a run file names and needs neither a device nor a tracker for: profiles, data, model, channel groups, widths.

Together with ``assemble`` the composition root; apart from it, because ``secateur validate`` stops here and must be
quick.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.device_profiles.calibration import load as load_probe
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.profile import RUNTIMES, DeviceProfile, Multiples, load_profile
from secateur.device_profiles.staircase import FLOAT
from secateur.device_profiles.target import require_complete
from secateur.pipeline.config.choices import method_options
from secateur.pipeline.config.faults import Fault, FaultsError
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.shipped_data import open_section
from secateur.pipeline.run.widths import common_multiples, group_multiples, probed_in
from secateur.pipeline.surroundings import home
from secateur.pipeline.workloads import Workload
from secateur.pipeline.workloads.data.content import Reading
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import costs
from secateur.pruning.plan import IntArray, PlanError, SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.beginning import from_uniform
from secateur.pruning.search.landing import at_target
from secateur.pruning.search.protocol import Budget, Evaluation, FloatArray, Goal, Problem, Strategy
from secateur.pruning.search.reward import Reward, make_reward
from secateur.pruning.search.scope import Spaces
from secateur.pruning.trace import trace
from secateur.pruning.tracer import PruningError

Steps = Multiples | Mapping[str, int] | int


def compute_device(name: str) -> torch.device:
    """Where networks are trained and evaluated.

    Raises:
        UserError: ``cuda`` is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device here; set compute: auto or cpu")
    return torch.device(name)


def device_profiles(config: RunFile) -> tuple[DeviceProfile, ...]:
    """The device profiles a run file names, its own device first.

    Raises:
        FaultsError: profiles are unknown, invalid, templates, not measured on so far, or do not go together.
    """
    section = config.device
    asked = [("device.profile", section.profile), *(("device.others", name) for name in section.others)]
    found, faults = [], []
    for key, name in asked:
        try:
            found.append(_profile(name))
        except (UserError, DeviceError) as error:
            faults.append(Fault(tuple(key.split(".")), str(error)))
    names = [profile.name for profile in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        faults.append(Fault(("device", "others"), f"{', '.join(twice)} would be measured twice; name each device once"))
    known = RUNTIMES.names()
    if unknown := [name for name in section.runtimes if name not in known]:
        text = f"unknown runtime {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
        faults.append(Fault(("device", "runtimes"), text))
    unfit = [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name)]
    if unfit and len(asked) > 1:
        faults.append(
            Fault(
                ("device", "others"),
                f"metrics and files are named after the devices, and {unfit[0]!r} has other characters than letters, "
                "digits, '_', '-' and '.'; rename its profile's file",
            )
        )
    if faults:
        raise FaultsError("the run file", faults)
    return tuple(found)


def device_profile(config: RunFile) -> DeviceProfile:
    """The profile of the run's own device, with all of them checked."""
    return device_profiles(config)[0]


def _profile(name: str) -> DeviceProfile:
    profile = load_profile(name, [home() / "devices"])
    require_complete(profile)
    if not profile.timing:
        raise UserError(
            f"device profile {profile.name} is emulated (timing: false): its times say nothing about a device; "
            "name one that can be timed (`secateur list devices`)"
        )
    if profile.batch != 1:
        raise UserError(f"device profile {profile.name}: only batch 1 is measured so far; set batch: 1")
    return profile


def check_precisions(config: RunFile) -> None:
    """See that networks can be exported in every precision that may ship.

    Raises:
        UserError: they cannot; lists those that there are.
    """
    if config.ships == ("fp32",) and not config.layers_may_differ:
        return
    from secateur.export.quantize import PRECISIONS  # imports onnx, which takes long

    if unknown := [name for name in config.ships if name not in PRECISIONS]:
        raise UserError(f"unknown: {', '.join(unknown)}; known: {', '.join(PRECISIONS)}")
    calibrated = any(PRECISIONS[name].calibrated for name in config.ships)
    if config.layers_may_differ and not calibrated:
        raise UserError("layers: true is about networks of integers; put int8 among those that ship, or leave it out")
    if config.export.dynamic_batch and calibrated:
        raise UserError("integers are calibrated for one image at a time so far; leave export.dynamic_batch out")


def check_quantise(config: RunFile) -> None:
    """See that a training with steps of integers is of use.

    Raises:
        UserError: no integers may ship.
    """
    if config.finetune.quantise == "int8" and "int8" not in config.ships:
        raise UserError("trains for int8, which may not ship; write precision: [fp32, int8], or leave it out")


def open_workload(config: RunFile, reading: Reading = Reading()) -> Workload:  # noqa: B008 - frozen
    """The run's model, data, loss and metric.

    Args:
        reading: how thoroughly image files are looked at.

    Raises:
        UserError: data or weights are missing, damaged, or do not fit.
    """
    return open_section(config.workload, reading)


def check_forward(model: nn.Module, example: torch.Tensor) -> tuple[int, ...]:
    """Run the model once on the example input; returns its output's shape (empty where it is no tensor).

    Raises:
        UserError: it fails there, or its outputs are no finite numbers; nothing later could work.
    """
    try:
        with torch.no_grad():
            outputs = model.eval()(example)
    except Exception as error:
        raise UserError(
            f"the model's forward fails on the example input of shape {tuple(example.shape)}: {type(error).__name__}: "
            f"{error}. Check data.image_size and data.channels against what the network expects"
        ) from error
    if not isinstance(outputs, torch.Tensor):
        return ()
    if not bool(torch.isfinite(outputs).all()):
        raise UserError(
            "the network's outputs on the example input are NaN or infinite: its weights are damaged, or data.std is "
            "too small"
        )
    return tuple(outputs.shape)


def trace_network(model: nn.Module, example: torch.Tensor) -> ChannelGraph:
    """The network's channel groups.

    Raises:
        UserError: the network cannot be traced; says where and why.
    """
    try:
        return trace(model, example)
    except PruningError as error:
        raise UserError(str(error)) from error


def frozen_groups(patterns: Sequence[str], graph: ChannelGraph) -> list[str]:
    """The channel groups that ``search.frozen`` names.

    Raises:
        FaultsError: a pattern matches none.
    """
    names = [group.name for group in graph.groups]
    unmatched = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
    if unmatched:
        raise FaultsError(
            "the run file",
            [Fault(("search", "frozen"), f"{unmatched} match no channel group; the network has {', '.join(names)}")],
        )
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]


def search_space(config: RunFile, graph: ChannelGraph, steps: Steps) -> SearchSpace:
    """The widths the search may choose from.

    Args:
        steps: the width granularity of the devices, per kind of layer, per channel group or one for all;
            ``search.channel_multiple`` and ``device.channel_multiple`` go before it.

    Raises:
        UserError: ``search.frozen`` matches nothing, or nothing is left to prune.
    """
    section = config.search
    frozen = frozen_groups(section.frozen, graph)
    multiple: int | Mapping[str, int] | None = section.channel_multiple or config.device.channel_multiple
    if multiple is None:
        multiple = group_multiples(graph, graph.shapes, steps) if isinstance(steps, Multiples) else steps
    try:
        return SearchSpace.of(
            graph.groups, channel_multiple=multiple, min_keep_ratio=section.min_keep_ratio, frozen=frozen
        )
    except PlanError as error:
        raise UserError(f"{error}\n{graph.report()}") from error


def device_space(config: RunFile, graph: ChannelGraph, steps: Steps) -> SearchSpace:
    """The same in the widths that suit the devices, whatever ``search.channel_multiple`` says."""
    search = config.search.model_copy(update={"channel_multiple": None})
    return search_space(config.model_copy(update={"search": search}), graph, steps)


def search_spaces(config: RunFile, graph: ChannelGraph, steps: Steps, head_prefixes: Sequence[str] = ()) -> Spaces:
    """The widths the search may choose from, over all groups and over inner ones.

    Args:
        steps: as for ``search_space``.
        head_prefixes: beginnings of the names of a detector's heads: what they read is not inner.

    Raises:
        UserError: as ``search_space``.
    """
    whole = search_space(config, graph, steps)
    inner = {group.name for group in graph.groups} - graph.summed - read_by(graph, head_prefixes)
    is_part = bool(inner & set(whole.names)) and not inner >= set(whole.names)
    return Spaces(whole, whole.over(inner) if is_part else None)


def read_by(graph: ChannelGraph, prefixes: Sequence[str]) -> set[str]:
    """The channel groups that tensors with such beginnings of their names read."""
    heads = tuple(prefixes)
    return {group.name for group in graph.groups if any(m.reads and m.tensor.startswith(heads) for m in group.members)}


def head_prefixes_of(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of a detector's heads, as its network says them; none for other networks."""
    return tuple(getattr(model, "head_prefixes", None) or ())


def known_steps(profiles: Iterable[DeviceProfile], ships: Sequence[str] = (FLOAT,)) -> tuple[Multiples, bool]:
    """The width granularity of devices as far as it is known without reaching them, and whether all were probed.

    Args:
        ships: the precisions that may ship.
    """
    found = []
    probed = True
    for profile, name in itertools.product(profiles, probed_in(ships)):
        try:
            staircase = load_probe(home() / "devices", profile, precision=name)
        except DeviceError:
            staircase = None  # a damaged file; the run probes again
        found.append(profile.multiples if staircase is None else staircase.multiples)
        probed &= staircase is not None
    return common_multiples(found), probed


def spared_the_probe(config: RunFile) -> str:
    """Why a run's devices are not probed with its network; empty where they are.

    That takes up to two minutes. It is for searches that look at latency, and for widths that nobody has set.
    """
    if config.search.channel_multiple is not None or config.device.channel_multiple is not None:
        return "the run file sets the channel multiple"
    if not config.device.probe:
        return "device.probe is off"
    return "" if looks_at_latency(config) else "neither the target nor the reward looks at latency"


def looks_at_latency(config: RunFile) -> bool:
    """Whether a search's target or reward depends on a latency."""
    if config.search.target.latency_ratio is not None:
        return True
    whole = Evaluation(metrics={"top1": 1.0, "macs": 2.0, "params": 2.0, "latency_ratio": 1.0})
    reward = make_reward(config.reward.preset, whole, "top1", **config.reward.options)
    half = {"top1": 1.0, "macs": 1.0, "params": 1.0}
    return reward(Evaluation(metrics={**half, "latency_ratio": 0.5})) != reward(
        Evaluation(metrics={**half, "latency_ratio": 0.8})
    )


def make_problem(
    config: RunFile, graph: ChannelGraph, space: SearchSpace, reference: Evaluation, reward: Reward, metric: str
) -> Problem:
    """What the search method of a run file is given."""
    return Problem(
        space,
        reference,
        reward,
        lambda widths: widths_costs(graph, space, widths),
        Goal(config.search.target.macs_ratio, config.search.target.latency_ratio),
        np.random.default_rng(config.seed),
        Budget(**config.search.budget.model_dump()),
        metric,
    )


def least_budget(method: str, problem: Problem, options: Any) -> Budget:
    """What one round of a method takes: as its module says (``least``), else one evaluation."""
    least: Callable[[Problem, Any], Budget] = getattr(
        METHODS.load(method), "least", lambda problem, options: Budget(evaluations=1)
    )
    return least(problem, options)


def make_strategy(
    config: RunFile,
    graph: ChannelGraph,
    space: SearchSpace,
    reference: Evaluation,
    reward: Reward,
    metric: str,
    multiples: tuple[int, ...] = (),
    *,
    rehearsed: bool = False,
) -> Strategy:
    """The search method of a run file, ready to be asked for its first request.

    Args:
        reference: the unpruned network's evaluation.
        metric: the accuracy that the search goes by.
        multiples: of the uniform plans that are measured at first (``Problem.multiples``).
        rehearsed: the answers are made up, to count the requests; a method whose engine takes long to import has a
            function ``rehearse`` for that, which asks for as much without it.
    """
    problem = replace(make_problem(config, graph, space, reference, reward, metric), multiples=multiples)
    method = METHODS.load(config.search.method)
    search = getattr(method, "rehearse", method.search) if rehearsed else method.search
    options = method_options(config.search)
    return from_uniform(problem, lambda problem: at_target(problem, search(problem, options)))


def widths_costs(graph: ChannelGraph, space: SearchSpace, widths: IntArray) -> dict[str, FloatArray]:
    """``Problem.costs``: groups outside the space keep their full width."""
    names = [group.name for group in graph.groups]
    whole = np.repeat([[group.size for group in graph.groups]], len(widths), axis=0)
    whole[:, [names.index(name) for name in space.names]] = widths
    found = costs(graph, whole)
    return {name: getattr(found, name).astype(float) for name in ("macs", "params", "activation_bytes")}
