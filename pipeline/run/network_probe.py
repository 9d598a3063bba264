"""Which widths pay in a run's own network: cut alike in several ways, timed on its devices, kept for later runs.

What was found is a line of the journal, which is where the search's widths come from: a resumed run, and a replay, see
the same. The arithmetic is in ``secateur.device_profiles.network_probe``.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from secateur.device_profiles import BenchmarkResult, DeviceError, Multiples, Tier, measure
from secateur.device_profiles.calibration import load_network, networks_of, save_network
from secateur.device_profiles.network_probe import (
    MACS_RATIOS,
    MULTIPLES,
    Cut,
    Loss,
    NetworkProbe,
    Trial,
    best_of,
    finest,
    key_of,
    loss_of,
    slope_of,
)
from secateur.device_profiles.staircase import FLOAT, fingerprint_of, setting_of
from secateur.device_profiles.wording import number_of
from secateur.pipeline.devices.fleet import Device, Fleet, Tally
from secateur.pipeline.errors import JournalError
from secateur.pipeline.progress import ProgressView, Report
from secateur.pipeline.run.journal import Journal, Record
from secateur.pipeline.run.opening import widths_costs
from secateur.pipeline.run.widths import group_multiples, kinds_of_groups
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PlanError, PruningPlan, SearchSpace
from secateur.pruning.search.landing import filled
from secateur.pruning.search.protocol import Evaluation, Goal, Problem
from secateur.pruning.search.support import Limit, SearchError, macs_ratios

if TYPE_CHECKING:
    from secateur.export.slicing import OnnxTemplate

STAGE = "network probe"
BEFORE = frozenset({"metric", "scope", "smallest", "reference", "search"})
"""Stages that begin after this one."""
CLOSE = 0.05
"""Loss up to which a multiple's uniform plan is worth a measurement at a search's own target."""
SECONDS, LEAST_SECONDS = 120.0, 10.0
"""What a probe may take at most, and at least; kinds of groups that are not reached by then keep the best multiple for
all."""
SEARCH_SHARE = 0.25
"""Of the time that the run's search takes may go into its probe."""
FEW_BELOW = 15.0
"""Seconds below which a probe times fewer networks, and settles one multiple for all groups only."""
FEW_MULTIPLES, FEW_RATIOS = (1, 4, 8, 16), MACS_RATIOS[:2]
FIRST_SHARE = 0.4
"""Of these seconds goes into the choice of one multiple for all."""
LEAST_CALLS = 1.0
"""Seconds of timed calls for one kind of groups, at least."""
PROCESSES = 3
LOADED_BYTES = 256 << 20
"""Of files that one process on the device loads at a time."""
MOST_KINDS = 6
"""Kinds of groups that are tried with finer widths: those with most channels."""
UNFIT = frozenset({"model-load", "worker-died", "timeout", "client-timeout", "disk-full", "too-large"})
"""Codes of errors that say no more than that so many networks are too much for a device."""

Plans = Mapping[tuple[int, float], PruningPlan]
"""By multiple and MACs ratio."""


class Cutter(Protocol):
    """What files of plans are cut from, in some precision: ``OnnxTemplate``, ``QuantisedTemplate``."""

    def write(self, plan: PruningPlan, path: str | Path) -> None:
        """The file of a plan, with the unpruned network's weights."""


class Cuts:
    """Plans of a network that keep the same share of every group: one for each multiple and MACs ratio.

    Args:
        frozen: names of groups that keep all channels.
    """

    def __init__(self, graph: ChannelGraph, frozen: Sequence[str] = ()) -> None:
        self.graph, self.frozen = graph, tuple(frozen)
        self.kinds = {n: k for n, k in kinds_of_groups(graph, graph.shapes).items() if n not in self.frozen}

    def of(self, multiples: Mapping[str, int], macs_ratio: float) -> PruningPlan | None:
        """The plan whose widths are multiples of these, nearest below a share of the MACs; None where there is none.

        Args:
            multiples: kind of group -> multiple.
        """
        try:
            of_groups = {name: multiples[kind] for name, kind in self.kinds.items()}
            space = SearchSpace.of(self.graph.groups, channel_multiple=of_groups, frozen=self.frozen)
            problem = Problem(
                space,
                Evaluation(),
                lambda evaluation: 0.0,
                lambda widths: widths_costs(self.graph, space, widths),
                Goal(),
                np.random.default_rng(0),
            )
            alike = {name: np.ones(size) for name, size in space.sizes.items()}
            plan = filled(problem, Limit("macs_ratio", macs_ratios(problem), macs_ratio), alike)
        except (PlanError, SearchError):
            return None
        return None if plan.is_full or self.macs_ratio(plan) > macs_ratio else plan

    def macs_ratio(self, plan: PruningPlan) -> float:
        """MACs of a plan to those of the unpruned network."""
        space = self._space
        macs = widths_costs(self.graph, space, np.stack([space.encode(plan), space.encode(space.full)]))["macs"]
        return float(macs[0] / macs[1])

    @cached_property
    def _space(self) -> SearchSpace:
        return SearchSpace.of(self.graph.groups, frozen=self.frozen)

    def alike(self, multiples: Sequence[int] = MULTIPLES, ratios: Sequence[float] = MACS_RATIOS) -> Plans:
        """All groups with one multiple: those that lead to other networks than a smaller one."""
        every = {m: dict.fromkeys(self.kinds.values(), m) for m in multiples}
        return _distinct({(m, ratio): self.of(of, ratio) for m, of in every.items() for ratio in ratios})

    def finer(self, multiples: Mapping[str, int], kind: str) -> Plans:
        """One kind of groups with smaller multiples, the others as they are."""
        smaller = [m for m in MULTIPLES if m < multiples[kind]]
        return _distinct({(m, r): self.of({**multiples, kind: m}, r) for m in smaller for r in MACS_RATIOS[:2]})

    def by_size(self) -> list[str]:
        """The kinds of groups, the one with most channels first."""
        totals: dict[str, int] = {}
        for group in self.graph.groups:
            if group.name in self.kinds:
                totals[self.kinds[group.name]] = totals.get(self.kinds[group.name], 0) + group.size
        return sorted(totals, key=lambda kind: -totals[kind])[:MOST_KINDS]


def _distinct(plans: Mapping[tuple[int, float], PruningPlan | None]) -> Plans:
    """Without multiples that lead to the same networks as a smaller one, or to none."""
    found: dict[tuple[int, float], PruningPlan] = {}
    seen: set[tuple[str, ...]] = set()
    for multiple in dict.fromkeys(m for m, _ in plans):
        own = {at: plan for at, plan in plans.items() if at[0] == multiple and plan is not None}
        digests = tuple(plan.digest for plan in own.values())
        if digests and digests not in seen:
            seen.add(digests)
            found |= own
    return found


class _Stopwatch:
    """Times plans of one network on one device.

    Args:
        cutter: what plans' files are cut from, in the precision that is timed.
        folder: for files.
    """

    def __init__(self, device: Device, template: OnnxTemplate, cutter: Cutter, cuts: Cuts, folder: Path) -> None:
        self.device, self.cutter, self.cuts, self.folder = device, cutter, cuts, folder
        self.dense = folder / "dense.onnx"
        template.write(PruningPlan.full(cuts.graph.groups), self.dense)

    def time(self, plans: Plans, seconds: float) -> dict[int, tuple[Cut, ...]]:
        """The networks of every multiple, timed in turn.

        Args:
            seconds: of timed calls, at most; loading comes on top.
        """
        found: dict[int, tuple[Cut, ...]] = {}
        files = {at: self._write(at, plan) for at, plan in plans.items()}
        for part in self._loadable(files):
            result = self._measure(part, seconds * len(part) / len(files))
            for at in part:
                cut = Cut(self.cuts.macs_ratio(plans[at]), _per_process(result, _name(at)))
                found[at[0]] = (*found.get(at[0], ()), cut)
        for file in files.values():
            file.unlink()
        return found

    def _loadable(self, files: Mapping[tuple[int, float], Path]) -> Iterator[dict[tuple[int, float], Path]]:
        """The files in parts that one process on the device can load beside the unpruned network."""
        part: dict[tuple[int, float], Path] = {}
        room = LOADED_BYTES - self.dense.stat().st_size
        for at, file in files.items():
            size = file.stat().st_size
            if part and size > room:
                yield part
                room, part = LOADED_BYTES - self.dense.stat().st_size, {}
            part[at] = file
            room -= size
        if part:
            yield part

    def _write(self, at: tuple[int, float], plan: PruningPlan) -> Path:
        file = self.folder / f"{_name(at)}.onnx"
        self.cutter.write(plan, file)
        return file

    def _measure(self, files: Mapping[tuple[int, float], Path], seconds: float) -> BenchmarkResult:
        share = seconds / PROCESSES
        tier = Tier(
            processes=PROCESSES,
            warmup=1,
            max_warmup_seconds=min(0.5, share),
            min_repeats=8,
            min_seconds=min(1.0, share),
            max_seconds=share,
        )
        models = {"dense": self.dense, **{_name(at): file for at, file in files.items()}}
        return measure(self.device.target, self.device.profile, models, tier)


def _name(at: tuple[int, float]) -> str:
    return f"{at[0]}-{at[1]:g}"


def _per_process(result: BenchmarkResult, name: str) -> tuple[float, ...]:
    """Latency ratios to the unpruned network, one per process."""
    return tuple(replace(result, processes=(process,)).ratio(name, "dense").value for process in result.processes)


def network_of(template: OnnxTemplate, cuts: Cuts) -> str:
    """Digest of a network as a probe sees it: operators, shapes and groups, whatever its weights."""
    return hashlib.sha256(json.dumps([template.structure, cuts.kinds], sort_keys=True).encode()).hexdigest()[:16]


def probe_seconds(search_seconds: float) -> float:
    """What a probe may take beside a search.

    Args:
        search_seconds: of the search, without the probe.
    """
    return min(SECONDS, max(LEAST_SECONDS, SEARCH_SHARE * search_seconds))


def probe_network(
    device: Device,
    template: OnnxTemplate,
    cuts: Cuts,
    fingerprint: str,
    progress: Report,
    seconds: float = SECONDS,
    precision: str = FLOAT,
    cutter: Cutter | None = None,
) -> NetworkProbe | None:
    """Find the widths that pay; None where the network can be cut in one way only.

    Args:
        template: of the network in fp32.
        fingerprint: of device, runtime, settings and precision.
        seconds: that it may take; few of them are spent on fewer networks.
        precision: that plans are timed in.
        cutter: what they are cut from; None = ``template``.

    Raises:
        DeviceError: whatever the device reports.
    """
    begun = time.monotonic()
    few = seconds < FEW_BELOW
    plans = cuts.alike(FEW_MULTIPLES, FEW_RATIOS) if few else cuts.alike()
    if len({multiple for multiple, _ in plans}) < 2:
        return None
    kinds = [] if few else cuts.by_size()  # in so few calls, what a kind's finer widths cost would be noise
    progress(0, 1 + len(kinds), f"{number_of(len(plans), 'network(s)')}")
    with tempfile.TemporaryDirectory(prefix="secateur-probe-") as folder:
        stopwatch = _Stopwatch(device, template, cutter or template, cuts, Path(folder))
        found = stopwatch.time(plans, FIRST_SHARE * seconds)
        loading = max(0.0, time.monotonic() - begun - FIRST_SHARE * seconds)
        multiple, losses = best_of(found)
        progress(1, 1 + len(kinds), f"multiples of {multiple}")
        multiples, trials = dict.fromkeys(cuts.kinds.values(), multiple), []
        best = {at: plan for at, plan in plans.items() if at[0] == multiple and at[1] in MACS_RATIOS[:2]}
        for done, kind in enumerate(kinds, start=1):
            left = seconds - (time.monotonic() - begun)
            if left <= loading / 2:  # there are fewer networks for one kind
                break
            calls = max(LEAST_CALLS, left / (len(kinds) + 1 - done) - loading / 2)
            new = _relaxed(stopwatch, multiples, kind, best, calls, slope_of(found))
            trials += new
            multiples[kind] = finest({multiple: Loss(0.0), **{trial.multiple: trial.loss for trial in new}})
            progress(done + 1, 1 + len(kinds), f"{kind}: multiples of {multiples[kind]}")
    return NetworkProbe(
        device.name,
        fingerprint,
        network_of(template, cuts),
        multiple,
        multiples,
        cuts.kinds,
        found,
        losses,
        tuple(trials),
        round(time.monotonic() - begun, 1),
        time.time(),
        precision,
    )


def _relaxed(
    stopwatch: _Stopwatch,
    multiples: Mapping[str, int],
    kind: str,
    best: Plans,
    seconds: float,
    slope: float,
) -> list[Trial]:
    """Finer widths of one kind of groups, each compared with the best multiple for all groups.

    Args:
        multiples: of all kinds, as they were chosen so far.
        best: all groups with the best multiple.
        seconds: of timed calls, at most.
        slope: how latency follows MACs.
    """
    finer = stopwatch.cuts.finer(multiples, kind)
    if not finer:
        return []
    (reference,) = {multiple for multiple, _ in best}
    found = stopwatch.time({**best, **finer}, seconds)
    complete = [m for m, cuts in found.items() if m != reference and len(cuts) == len(found[reference])]
    return [Trial(kind, m, loss_of(found[m], found[reference], slope)) for m in complete]


# -- kept, and settled -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """What a run's journal says of its network on its devices.

    Args:
        probes: by device, and precision where that is not fp32 (``label``); those that were not probed are missing.
        reasons: why not, in the same way.
        of_groups: channel group -> what its widths are multiples of; empty = as devices' own probes or profiles say.
        at_most: the largest multiple with which the targets are within reach; None = those of ``of_groups`` are fine.
    """

    probes: Mapping[str, NetworkProbe]
    reasons: Mapping[str, str]
    of_groups: Mapping[str, int]
    at_most: int | None = None

    @property
    def best(self) -> tuple[int, ...]:
        """What a search compares uniform plans of: multiples within ``CLOSE`` of the best on some device."""
        losses = [(m, loss.value) for probe in self.probes.values() for m, loss in probe.losses.items()]
        return tuple(sorted({multiple for multiple, loss in losses if loss <= CLOSE}))

    @property
    def finer(self) -> tuple[int, ...]:
        """Largest multiples, each finer than what was found, down to 1."""
        return tuple(m for m in reversed(MULTIPLES) if m < max(self.of_groups.values(), default=1))

    def steps(self, at_most: int | None) -> dict[str, int]:
        """Channel group -> what its widths are multiples of, all of what was found among them.

        Args:
            at_most: powers of two up to this one; None = as found.
        """
        return {n: m if at_most is None else math.gcd(m, at_most) for n, m in self.of_groups.items()}


NOTHING = Settled({}, {}, {})


@dataclass(frozen=True)
class Precise:
    """A precision that may ship, as a probe of the network sees it.

    Args:
        name: of the precision.
        scheme: its number types, as ``U8S8``; empty = floats.
        cutter: gives what plans' files are cut from; None where they cannot be.
    """

    name: str
    scheme: str
    cutter: Callable[[], Cutter | None]

    def fingerprint(self, device: Device) -> str:
        """Names device, runtime, settings and precision."""
        assert device.facts is not None, "a device that was met"
        if self.name == FLOAT:
            return device.facts.fingerprint
        return fingerprint_of(device.profile, device.facts.facts, setting_of(self.name, self.scheme))


def label(device: str, precision: str) -> str:
    """What a device's probe in a precision is called: ``local``, ``local in int8``."""
    return device if precision == FLOAT else f"{device} in {precision}"


def settled(records: Sequence[Record]) -> Settled | None:
    """What a journal says; None before it is settled.

    Raises:
        JournalError: what it says cannot be read.
    """
    lines = [record for record in records if record.get("stage") == STAGE]
    if not lines:
        return None
    first, *later = lines
    try:
        probes = {n: NetworkProbe.from_json(json.dumps(data)) for n, data in first["probes"].items()}
        return Settled(probes, first["reasons"], first["multiples"], later[-1]["at_most"] if later else None)
    except (DeviceError, KeyError, AttributeError) as error:
        raise JournalError(f"the line of the stage {STAGE!r} cannot be read: {error}") from error


def settle_finer(journal: Journal, at_most: int) -> None:
    """Write down that the targets take finer widths than those that pay.

    Args:
        at_most: the largest multiple.
    """
    journal.append({"stage": STAGE, "kind": "choice", "at_most": at_most})


def settle(
    journal: Journal,
    fleet: Fleet,
    template: Callable[[], OnnxTemplate | None],
    cuts: Cuts,
    folder: Path,
    progress: ProgressView,
    spared: str = "",
    seconds: Callable[[], float] = lambda: SECONDS,
    precise: Mapping[str, Sequence[Precise]] | None = None,
) -> Settled:
    """Find the widths that pay on every device in what may ship, and write them down; once a run.

    Args:
        template: what networks are cut from; None = this network's cannot be cut.
        folder: where probes are kept for later runs.
        spared: why no device is probed for this run, so that only kept probes count; empty = it is.
        seconds: what a device's probes may take together; asked only where one is probed.
        precise: device -> the precisions in which widths have to pay there; None = fp32 everywhere.

    Raises:
        DeviceError: a device is unreachable, or fails in a way that says nothing of the probe.
        ExportError: the network cannot be made in a precision at all.
    """
    if (known := settled(journal.records)) is not None:
        return known
    if any(record.get("stage") in BEFORE for record in journal.records):
        return NOTHING  # an earlier version of Secateur began it, and it goes on with the widths it began with
    if spared and not any(networks_of(folder, name) for name in fleet.names):
        return NOTHING
    found, reasons = {}, {}
    precise = precise or dict.fromkeys(fleet.names, (Precise(FLOAT, "", template),))
    if (cut := template()) is None:
        labels = [label(name, each.name) for name in fleet.names for each in precise[name]]
        reasons = dict.fromkeys(labels, "the network is exported anew for every plan, which takes too long")
    else:
        answers = _on_every(fleet, cut, cuts, folder, progress, spared, seconds, precise)
        found = {name: answer for name, answer in answers.items() if isinstance(answer, NetworkProbe)}
        reasons = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    if spared and not found:
        return NOTHING
    groups = _common(fleet, found, cuts) if found else {}
    told = {name: json.loads(probe.to_json()) for name, probe in found.items()}
    journal.append({"stage": STAGE, "kind": "choice", "probes": told, "reasons": reasons, "multiples": groups})
    return Settled(found, reasons, groups)


def _on_every(
    fleet: Fleet,
    template: OnnxTemplate,
    cuts: Cuts,
    folder: Path,
    progress: ProgressView,
    spared: str,
    seconds: Callable[[], float],
    precise: Mapping[str, Sequence[Precise]],
) -> dict[str, NetworkProbe | str]:
    """What was found on every device in every precision, kept or new; a text says why there is nothing."""
    network, found = network_of(template, cuts), dict[str, NetworkProbe | str]()
    missing: dict[str, list[Precise]] = {}
    for device in fleet:
        for each in precise[device.name]:
            kept = load_network(folder, device.profile, key_of(each.fingerprint(device), network))
            if kept or spared:
                found[label(device.name, each.name)] = kept or spared
            else:
                missing.setdefault(device.name, []).append(each)
    if not missing:
        return found
    with progress.stage(f"Probe {', '.join(missing)} with this network") as report:
        tally, most = Tally(report, missing), seconds()
        cutters = {(each.name, each.scheme): each.cutter() for of in missing.values() for each in of}

        def probed(device: Device, each: Precise) -> NetworkProbe | str:
            cutter, share = cutters[each.name, each.scheme], most / len(missing[device.name])
            if cutter is None:
                return f"the network cannot be cut in {each.name}"
            prints, told = each.fingerprint(device), tally.of(label(device.name, each.name))
            try:
                probe = probe_network(device, template, cuts, prints, told, share, each.name, cutter)
            except DeviceError as error:
                if error.code not in UNFIT:
                    raise
                return f"so many networks are too much for it: {error}"
            if probe is None:
                return "the network can be cut in one way only"
            save_network(folder, device.profile, probe)
            return probe

        def all_of(device: Device) -> dict[str, NetworkProbe | str]:
            return {label(device.name, each.name): probed(device, each) for each in missing[device.name]}

        for answers in fleet.each(all_of, list(missing)).values():
            found |= answers
    return found


def _common(fleet: Fleet, found: Mapping[str, NetworkProbe], cuts: Cuts) -> dict[str, int]:
    """Channel group -> the least multiple that suits all; by a device's own probe where it has no other."""
    each = [probe.of_groups for probe in found.values()]
    probed = {probe.profile for probe in found.values()}
    each += [
        group_multiples(cuts.graph, cuts.graph.shapes, Multiples(**device.facts.multiples))
        for device in fleet
        if device.facts is not None and device.name not in probed
    ]
    return {name: math.lcm(*(of_groups.get(name, 1) for of_groups in each)) for name in cuts.kinds}
