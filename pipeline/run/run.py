"""The composition root: the only place that turns the names of a run file into objects."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from functools import cache, cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from secateur import __version__
from secateur.device_profiles import DeviceProfile, Multiples, Target, measure, plain_yaml
from secateur.device_profiles.cores import usable_cores
from secateur.device_profiles.target import kind_of
from secateur.device_profiles.wording import command
from secateur.export.onnx_export import write_atomically
from secateur.export.qdq import most_careful
from secateur.pipeline.config import trust
from secateur.pipeline.config.choices import method_options
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.devices.device import Leased, RunDevice, meet
from secateur.pipeline.devices.fleet import Device, Fleet, FleetProgress
from secateur.pipeline.errors import JournalError, SurroundingsError, UserError
from secateur.pipeline.evaluation.accuracy import AccuracyEvaluator
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.evaluation.onnx_files import CANDIDATES, OnnxFiles
from secateur.pipeline.evaluation.precisions import FLOAT, Precisions
from secateur.pipeline.evaluation.worker_pool import Engine, WorkerPool
from secateur.pipeline.files import write_whole
from secateur.pipeline.progress import ProgressView
from secateur.pipeline.run import layer_precisions, network_probe, schemes
from secateur.pipeline.run.estimate import search_seconds
from secateur.pipeline.run.facts import SearchSplitFacts
from secateur.pipeline.run.journal import Journal, Record, read_journal, require_format
from secateur.pipeline.run.metric import settle, settled
from secateur.pipeline.run.opening import (
    Steps,
    check_forward,
    device_space,
    frozen_groups,
    head_prefixes_of,
    looks_at_latency,
    make_strategy,
    open_workload,
    search_space,
    search_spaces,
    spared_the_probe,
)
from secateur.pipeline.run.origin import BRANCH, COMMIT, FOLDER, ORIGIN, check_tracked_at, origin_of, read_origin
from secateur.pipeline.run.preflight import examine
from secateur.pipeline.run.records import to_evaluation
from secateur.pipeline.run.schemes import scheme_of
from secateur.pipeline.run.widths import common_multiples, probed_in
from secateur.pipeline.surroundings import HOME, home, made
from secateur.pipeline.tracking import Tracker
from secateur.pipeline.tracking.check import require_tracking
from secateur.pipeline.tracking.tracker import Data
from secateur.pipeline.training.loop import keep_freed_memory
from secateur.pipeline.workloads import Workload
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.record import DataRecord, differences
from secateur.pipeline.workloads.data.record import read as read_record
from secateur.pipeline.workloads.data.record import write as write_record
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.protocol import Budget, Evaluation, Goal, Strategy
from secateur.pruning.search.reward import Reward, make_reward
from secateur.pruning.search.scope import Spaces

Lease = Callable[[], AbstractContextManager[None]]
"""Entered for as long as a device is used."""

__all__ = ["Run", "check_forward", "create_run_directory", "open_run_directory", "open_workload"]


def create_run_directory(config: RunFile) -> Path:
    """A new directory with ``run.yaml`` (the whole configuration, itself a run file) and the run's id.

    Raises:
        SurroundingsError: it cannot be made.
    """
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    directory = made(home(), HOME) / "runs" / f"{config.name}-{stamp}"
    content = plain_yaml.dump(config.model_dump(mode="json"))
    try:
        directory.mkdir(parents=True)
        write_whole(directory / "run.yaml", content)
        write_whole(directory / ORIGIN, json.dumps(origin_of(directory.name, config)) + "\n")
    except OSError as error:
        raise SurroundingsError(f"cannot create run directory {directory}: {error.strerror}") from error
    trust.hand_on(config, directory)
    return directory


def open_run_directory(directory: Path) -> tuple[str, RunFile]:
    """Run id and configuration of an existing run directory.

    Raises:
        UserError: it is none, or its ``run.yaml`` was edited into something invalid.
    """
    try:
        origin = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
        run_id, lay = str(origin["run_id"]), origin.get(FOLDER)
        text = (directory / "run.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        recent = sorted((home() / "runs").glob("*/run.yaml"), key=lambda p: p.stat().st_mtime)[-3:]
        hint = f"; recent runs: {', '.join(str(p.parent) for p in recent)}" if recent else ""
        raise UserError(
            f"{directory} is not a run directory (no readable run.yaml and origin.json in it){hint}"
        ) from error
    config = parse_run_file(text, str(directory / "run.yaml"))
    return run_id, config.lying_in(Path(lay) if isinstance(lay, str) else None)


class Run:
    """One run: its configuration, its directory, and the objects made from them, each when first needed.

    Args:
        directory: a run directory made by ``create_run_directory``.
        progress: where long work is shown.

    Raises:
        UserError: something that the run file asks for is not possible; lists everything (``preflight``).
        OlderRunError: another version of Secateur began the run, and this one would go on in another way.
        TrackingError: a tracking server that is required does not answer.
        JournalError: the journal is damaged, foreign or in use.
    """

    def __init__(self, directory: Path, progress: ProgressView) -> None:
        self.directory, self.progress = directory.absolute(), progress
        self.run_id, _ = open_run_directory(directory)
        check_format(self.directory / "journal.jsonl")
        self.config = trust.consented(lambda: open_run_directory(directory)[1], self.directory / "run.yaml")
        check_tracked_at(self.directory, self.config)
        require_tracking(self.config, home(), progress.say)
        torch.set_num_threads(self.config.threads or usable_cores())
        keep_freed_memory()
        found = examine(self.config, Reading(progress), begun=has_begun(self.directory / "journal.jsonl"))
        self.profiles, self.compute, workload = found.require(str(self.directory / "run.yaml"))
        self.profile = self.profiles[0]
        check_data(self.directory, workload.record)
        for note in found.notes:
            progress.say(f"Note: {note}")
        metrics = (workload.metric, workload.search_metric)
        options = asdict(method_options(self.config.search))
        file = self.directory / "journal.jsonl"
        self.journal = Journal(file, self.run_id, self.config.digest, workload.fingerprint, metrics, options)
        self._going_by = cache(workload.going_by)
        self._as_asked = workload
        self._leases: Mapping[str, Lease] = {}
        self._engine: Engine | None = None
        self._pool: WorkerPool | None = None
        self._rewards: dict[str, Reward] = {}
        self._reference: Evaluation | None = None
        self._resources = contextlib.ExitStack()
        self._resources.callback(self.journal.close)
        params = flatten(self.config.model_dump(mode="json"))
        compat = bool(self.config.search.options.get("paper_compat"))
        labels = {"secateur.method": self.config.search.method, "secateur.paper_compat": str(compat).lower()}
        labels |= {"secateur.device": ", ".join(profile.name for profile in self.profiles), **_source(self.directory)}
        self.tracker = Tracker(
            self.config.tracking,
            home(),
            self.run_id,
            self.run_id,
            params,
            labels,
            self.directory / "tracking.lock",
            self._derived,
            _data(self.config, workload),
        )

    @property
    def workload(self) -> Workload:
        """What is pruned; it goes by the metric that the journal names, once that is settled (``settle_metric``)."""
        split = settled(self.journal.records)
        return self._as_asked if split is None else self._going_by(split.metric)

    def settle_metric(self, model: nn.Module, graph: ChannelGraph) -> SearchSplitFacts:
        """Settle what the search goes by, before candidates of the trained baseline are evaluated."""

        def look() -> tuple[float, float]:
            baseline = Baseline(model, graph, self._as_asked, self.config.seed, self.compute)
            return AccuracyEvaluator(
                baseline, self.directory / CANDIDATES, self.config.search, lambda: None
            ).memorised()

        split = settle(self.journal, self._as_asked, look)
        self.tracker.label("secateur.search_metric", split.metric)
        return split

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tracker.close()
        self._resources.close()

    @cached_property
    def _opened(self) -> Fleet:
        """The devices, opened; nothing is reached before its first use."""
        devices = []
        for profile in self.profiles:
            target = trust.open_target(profile)
            self._resources.callback(target.close)
            devices.append(Device(profile, Leased(target, partial(self._leased, profile))))
        section = self.config.device
        return Fleet(devices, section.combine, section.wait_s, self.progress.say)

    @contextlib.contextmanager
    def _leased(self, profile: DeviceProfile) -> Iterator[None]:
        if self._pool is not None and self._pool.engine.local and kind_of(profile).this_machine:
            self._pool.rest()  # workers on the very machine that is measured would take its cores and its caches
        with self._leases.get(profile.name, contextlib.nullcontext)():
            yield

    def lease_devices(self, leases: Mapping[str, Lease]) -> None:
        """Enter a device's lease around every use of it from now on: a scheduler's way to keep other flows off it.

        Args:
            leases: by the devices' names.
        """
        self._leases = leases

    @property
    def target(self) -> Target:
        """The run's own device, opened."""
        return self._opened.primary.target

    @cached_property
    def fleet(self) -> Fleet:
        """The run's devices, met: probed now if that is asked for and was never done, and those the run began with."""
        section, fleet = self.config.device, self._opened

        def met(device: Device, progress: ProgressView) -> RunDevice:
            return meet(
                device.target,
                device.profile,
                self.directory,
                home(),
                probing=section.probe and section.channel_multiple is None,
                progress=progress,
                name=fleet.file("device", ".json", device.name),
                precise={
                    name: "" if name == FLOAT else schemes.candidates(device.profile)[0]
                    for name in probed_in(self.config.ships)
                },
            )

        if len(fleet) == 1:
            fleet.meet(lambda device: met(device, self.progress))
        else:
            with self.progress.stage(f"Meet {', '.join(fleet.names)}") as report:
                shown = FleetProgress(report, fleet.names)
                fleet.meet(lambda device: met(device, shown.of(device.name)))
        return fleet

    @cached_property
    def further(self) -> tuple[Device, ...]:
        """Every device in each of ``device.runtimes`` but its own, asked whether it has that.

        Raises:
            DeviceError: a runtime is not installed there; says what to do.
        """
        devices = []
        for device in self.fleet:
            for name in dict.fromkeys(self.config.device.runtimes):
                if name != device.profile.runtime:
                    profile = device.profile.model_copy(update={"runtime": name})
                    target = trust.open_target(profile)
                    self._resources.callback(target.close)
                    leased = Leased(target, partial(self._leased, device.profile))
                    leased.prepare()
                    devices.append(Device(profile, leased, device.facts, device.noise_floor))
        return tuple(devices)

    def check_runtimes(self) -> None:
        """See that every device has the further runtimes, before anything is searched; raises as ``further``."""
        assert self.further is not None

    @property
    def device_facts(self) -> RunDevice:
        """What is known of the run's own device."""
        return self.facts_of_devices[self.profile.name]

    @property
    def facts_of_devices(self) -> dict[str, RunDevice]:
        """What is known of every device."""
        return {device.name: device.facts for device in self.fleet if device.facts is not None}

    def evaluator(self, baseline: nn.Module, graph: ChannelGraph, space: SearchSpace | None = None) -> Evaluator:
        """An evaluator for the trained baseline; ``space`` is where its latency model may draw plans from."""
        return make_evaluator(
            Baseline(baseline, graph, self.workload, self.config.seed, self.compute, self.config.compute_count),
            self.fleet,
            self.directory / CANDIDATES,
            self.config.search,
            self.config.finetune,
            progress=self.progress,
            space=space,
            deterministic=self.config.search.forward == "deterministic" or self._engine is not None,
            workers=self._new_pool(),
            precisions=self.precisions(baseline, graph),
            schemes=self.schemes(baseline, graph),
        )

    def schemes(self, model: nn.Module, graph: ChannelGraph) -> Mapping[str, str]:
        """Device -> number types of its integers; empty where none may ship.

        Where a processor has kernels for several, the unpruned network is timed in each of them, once a run.

        Raises:
            ExportError: the network cannot be quantised.
            DeviceError: a device is unreachable.
        """
        integers = [name for name in probed_in(self.config.ships) if name != FLOAT]
        if not integers:
            return {}
        folder = self.directory / CANDIDATES
        baseline = Baseline(model, graph, self._as_asked, self.config.seed, self.compute)
        files, full = OnnxFiles(baseline, folder, self.progress), PruningPlan.full(graph.groups)

        def measured(name: str, tried: tuple[str, ...]) -> Mapping[str, float]:
            device, models = self.fleet[name], {FLOAT: files.dense}
            with self.progress.stage(f"Time {' and '.join(tried)} on {name}") as report:
                for scheme in tried:
                    models[scheme] = folder / f"{integers[0]}-{scheme}.onnx"
                    made = Precisions(self._as_asked, files.template, folder, scheme)
                    content = made.network(integers[0], full, None, lambda: baseline.cut(full))
                    write_atomically(models[scheme], content)
                result = measure(device.target, device.profile, models, "search", noise_floor=device.noise_floor)
                ratios = {scheme: result.ratio(scheme, FLOAT).value for scheme in tried}
                told = ", ".join(f"{scheme} {ratio:.2f}" for scheme, ratio in ratios.items())
                report(1, 1, f"{told} of the latency in fp32")
            return ratios

        return schemes.settle(self.journal, self.profiles, measured)

    def scheme(self, model: nn.Module, graph: ChannelGraph) -> str:
        """The number types that stand for all devices: the most careful of theirs."""
        return most_careful((self.schemes(model, graph) or {"": scheme_of(self.profiles)}).values())

    def precisions(self, model: nn.Module, graph: ChannelGraph) -> tuple[str, ...]:
        """Those that are tried for every candidate: what may ship, and mixtures where layers may differ.

        Raises:
            ExportError: the network cannot be quantised.
        """
        if not self.config.layers_may_differ:
            return self.config.ships

        def look(kind: str) -> dict[str, float]:
            baseline = Baseline(model, graph, self.workload, self.config.seed, self.compute)
            folder = self.directory / CANDIDATES
            files = OnnxFiles(baseline, folder, self.progress)
            made = Precisions(self.workload, files.template, folder, self.scheme(model, graph))
            with self.progress.stage(f"Try each layer alone in {kind}") as report:
                errors = made.sensitivity(kind)
                report(len(errors), len(errors), layer_precisions.told(errors))
            return errors

        return layer_precisions.settle(self.journal, self.config.ships, look).tried

    @contextlib.contextmanager
    def with_workers(self, engine: Engine | None) -> Iterator[None]:
        """Evaluators made meanwhile have candidates evaluated by worker processes; None = by this one."""
        self._engine = engine
        try:
            yield
        finally:
            if self._pool is not None:
                self._pool.close()
            self._engine = self._pool = None

    def _new_pool(self) -> WorkerPool | None:
        """Worker processes for another evaluator, in place of the last one's."""
        if self._pool is not None:
            self._pool.close()
        if self._engine is not None:
            baseline, folder = self.directory / "baseline.safetensors", self.directory / "workers"
            self._pool = WorkerPool(self._engine, self.config, baseline, folder)
        return self._pool

    def spaces(self, model: nn.Module, graph: ChannelGraph) -> Spaces:
        """The widths the search may choose from on this device, in either scope.

        Raises:
            UserError: ``search.frozen`` matches nothing, or nothing is left to prune.
        """
        return search_spaces(self.config, graph, self._steps(), head_prefixes_of(model))

    def finer_spaces(self, graph: ChannelGraph) -> dict[int | None, SearchSpace]:
        """The widths that pay, then ever finer ones that reach smaller networks; each by its largest multiple.

        Those that pay are under None.

        Raises:
            UserError: as ``spaces``.
        """
        settled = network_probe.settled(self.journal.records)
        if settled is None or not settled.of_groups:
            return {None: search_space(self.config, graph, self._steps())}
        found: dict[int | None, SearchSpace] = {}
        for most in (None, *settled.finer):
            space = search_space(self.config, graph, settled.steps(most))
            if all(space.smallest() != other.smallest() for other in found.values()):
                found[most] = space
        return found

    def device_space(self, graph: ChannelGraph) -> SearchSpace:
        """The widths that suit the devices, however fine those of the search are."""
        return device_space(self.config, graph, self._steps())

    def probe_network(self, model: nn.Module, graph: ChannelGraph, spared: str = "") -> network_probe.Settled:
        """Settle which widths of this network pay on the devices, before its candidates are evaluated.

        Args:
            model: the trained baseline.
            spared: why no device is to be probed for it; empty = as the run file says.

        Raises:
            DeviceError: a device is unreachable, or fails in a way that says nothing of the probe.
            UserError: ``search.frozen`` matches nothing.
        """
        baseline = Baseline(model, graph, self._as_asked, self.config.seed, self.compute)
        files = OnnxFiles(baseline, self.directory / CANDIDATES, self.progress)
        cuts = network_probe.Cuts(graph, frozen_groups(self.config.search.frozen, graph))
        spared = spared or spared_the_probe(self.config)
        folder = home() / "devices"
        spaces = self.spaces(model, graph)

        def seconds() -> float:
            return network_probe.probe_seconds(
                search_seconds(self.config, self.profiles, self.workload, graph, spaces, self.compute)
            )

        of_devices = self.schemes(model, graph)
        made = {
            scheme: Precisions(self._as_asked, files.template, self.directory / CANDIDATES, scheme)
            for scheme in set(of_devices.values())
        }

        def precise(device: str, name: str) -> network_probe.Precise:
            if name == FLOAT:
                return network_probe.Precise(FLOAT, "", files.template)
            scheme = of_devices[device]
            return network_probe.Precise(name, scheme, partial(made[scheme].template, name))

        ships = probed_in(self.config.ships)
        wanted = {device.name: [precise(device.name, name) for name in ships] for device in self.fleet}
        return network_probe.settle(
            self.journal, self.fleet, files.template, cuts, folder, self.progress, spared, seconds, wanted
        )

    def _steps(self) -> Steps:
        settled = network_probe.settled(self.journal.records)
        if settled is not None and settled.of_groups:
            return settled.steps(settled.at_most)
        return common_multiples(Multiples(**facts.multiples) for facts in self.facts_of_devices.values())

    def reward(self, reference: Evaluation, metric: str) -> Reward:
        """The run's reward, weighed against the unpruned network; tracked candidates carry it from now on.

        Args:
            metric: the accuracy it looks at, the workload's own or the search's.
        """
        section, names = self.config.reward, (self.workload.metric, self.workload.search_metric)
        self._reference = reference
        self._rewards = {name: make_reward(section.preset, reference, name, **section.options) for name in names}
        return self._rewards[metric]

    def _derived(self, record: Record) -> dict[str, float]:
        """What tracked candidates carry besides their metrics; nothing before there is a reference."""
        metric = self.workload.metric if record["stage"] == "final" else self.workload.search_metric
        reward, evaluation = self._rewards.get(metric), to_evaluation(record["evaluation"])
        value = None if reward is None else reward(evaluation)
        told = {} if value is None else {"reward": value}
        if self._reference is not None and (macs := evaluation.metrics.get("macs")) is not None:
            told["macs_ratio"] = macs / self._reference["macs"]
        return told

    @property
    def goal(self) -> Goal:
        """What the search aims at; nothing meets it if none is set."""
        return Goal(self.config.search.target.macs_ratio, self.config.search.target.latency_ratio)

    def budget(self) -> Budget:
        """What the search may spend."""
        return Budget(**self.config.search.budget.model_dump())

    def strategy(self, graph: ChannelGraph, space: SearchSpace, reference: Evaluation, reward: Reward) -> Strategy:
        """The search method, ready to be asked for its first request."""
        settled = network_probe.settled(self.journal.records)
        multiples = settled.best if settled is not None and looks_at_latency(self.config) else ()
        return make_strategy(self.config, graph, space, reference, reward, self.workload.search_metric, multiples)


def _source(directory: Path) -> dict[str, str]:
    """Where a run comes from, as MLflow's own tags say it: the command, and the commit of the run file's folder."""
    told = {"mlflow.source.name": "secateur run", "mlflow.source.type": "LOCAL", "secateur.version": __version__}
    begun = read_origin(directory)
    at = {"mlflow.source.git.commit": begun.get(COMMIT), "mlflow.source.git.branch": begun.get(BRANCH)}
    return {**told, **{tag: value for tag, value in at.items() if isinstance(value, str) and value}}


def _data(config: RunFile, workload: Workload) -> Data:
    """The run's data by a name without folders, which may be those of a person."""
    section = config.workload.get("data", {})
    names = (section.get(key) for key in ("dataset", "path", "train", "source"))
    name = Path(str(next(filter(None, names), config.workload.get("task", "data")))).name or "data"
    images = {split: len(getattr(workload, split)) for split in ("train", "search", "test")}
    return Data(name, workload.fingerprint, images, (-1, *workload.example_input().shape[1:]))


def check_data(directory: Path, found: DataRecord) -> None:
    """Write down which images a run begins with; if it has begun, see that they are still those, in those splits.

    Raises:
        UserError: they are not; says how many are gone, new and changed, and both ways on.
        SurroundingsError: the record cannot be written.
    """
    recorded = read_record(directory)
    if recorded is None:
        if has_begun(directory / "journal.jsonl"):
            raise UserError(
                f"{directory} holds no data.json, which says which images the run began with: it was removed, or the "
                "run was begun by an earlier version of Secateur, which drew the splits in another way. It cannot be "
                "continued; start a new run with "
                f"`{command('secateur', 'run', directory / 'run.yaml')}`"
            )
        write_record(found, directory)
        return
    told = differences(recorded, found)
    if told:
        raise UserError(
            f"this is not the data that the run began with: {told}. It would be tested on other images than it was "
            "kept from. Either restore the data as it was and resume again, or start a new run with "
            f"`{command('secateur', 'run', directory / 'run.yaml')}`"
        )


def check_format(journal: Path) -> None:
    """See that a journal, if there is one, can be continued; a damaged one counts, for its reader to say so.

    Raises:
        OlderRunError: it was begun by an older version of Secateur.
    """
    with contextlib.suppress(JournalError):
        require_format(journal, read_journal(journal)[0])


def has_begun(journal: Path) -> bool:
    """Whether a run has recorded anything; a damaged journal counts, for its reader to say so."""
    try:
        return journal.read_bytes().count(b"\n") > 1
    except OSError:
        return False


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat
