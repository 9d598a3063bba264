"""Promotion: may a challenger take the champion's place on a device?

Both are timed in one interleaved measurement and answer the same test images, so that what is compared differs in
nothing else. A gate that cannot be decided is not passed.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.device_profiles import BenchmarkResult, DeviceProfile, Ratio, Target, measure
from secateur.device_profiles.cores import usable_cores
from secateur.device_profiles.intervals import MANY_PROCESSES, of_processes, processes_that_tell
from secateur.device_profiles.shelf import NotAdmittedError
from secateur.device_profiles.wording import command, cut, number_of, printable
from secateur.export.batching import Predictor
from secateur.export.errors import ExportError
from secateur.export.verify import rehearse
from secateur.pipeline.config import trust
from secateur.pipeline.config.consents import Found
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import GateSection, RunFile
from secateur.pipeline.errors import UserError, VersionError
from secateur.pipeline.files import write_whole
from secateur.pipeline.progress import ProgressView, Silent
from secateur.pipeline.run.origin import FOLDER as FOLDER_OF_RUN
from secateur.pipeline.run.origin import read_origin
from secateur.pipeline.surroundings import home
from secateur.pipeline.tracking import ChampionMovedError, Decision, Gate, Registry, Version, alias_of
from secateur.pipeline.tracking.fetched import facts_of, text_of
from secateur.pipeline.tracking.manifest import FOLDER, MODEL
from secateur.pipeline.tracking.registry import CHALLENGER, CHAMPION, MANIFEST_TAG, RUN_TAG, STABLE, DeletedChampion
from secateur.pipeline.tracking.schemas import DataFacts, ParityFacts, Schema
from secateur.pipeline.workloads import Split, Workload
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.record import FACTS

RESAMPLES, MIN_RESAMPLES, RESAMPLING_S = 2000, 20, 60.0
CHUNK_BYTES = 256 << 20
"""Images and outputs of a part of the test split stay below this."""
ATTEMPTS = 3
NETWORK, INPUTS = "network.onnx", "benchmark-input.npz"
Consent = Callable[[Sequence[Found]], None]


@dataclass(frozen=True)
class Contender:
    """A version's files, on this machine.

    Args:
        model: what users run, and what is timed.
        network: what the test split is judged by: without postprocessing, where there is some.
        provenance: what ``provenance.json`` says.
    """

    version: Version
    model: Path
    network: Path
    provenance: Mapping[str, Any]

    @property
    def data(self) -> str | None:
        """Fingerprint of the data and the network's options."""
        return self.provenance.get("data")

    @property
    def folder(self) -> Path:
        return self.model.parent / FOLDER

    def facts(self, name: str, schema: type[Schema]) -> Schema | None:
        """A JSON file of the version; None when it has none."""
        return facts_of(self.folder / name, schema)


@dataclass(frozen=True)
class Rules:
    """What a version is judged by.

    Args:
        section: the gates.
        open: gives the images that the run was made for; it may raise UserError.
    """

    section: GateSection
    open: Callable[[], Workload]


def promote(
    registry: Registry,
    name: str,
    profile: DeviceProfile,
    target: Target,
    *,
    version: str | None = None,
    section: GateSection | None = None,
    workload: Workload | None = None,
    noise_floor: float | None = None,
    recorded: BenchmarkResult | None = None,
    key: str = "",
    progress: ProgressView | None = None,
    consent: Consent = trust.require,
) -> Decision:
    """Compare the challenger of a device with its champion, keep the decision, and promote it if every gate holds.

    Should another promotion take place meanwhile, it is compared again, with the new champion.

    Args:
        target: the device, opened.
        version: a number; None = the device's challenger.
        section: the gates; None = those of the run that made the version.
        workload: that the version was made for; None = opened from the version's own run file.
        noise_floor: of the device, where it was probed.
        recorded: the version's measurement on this very device, which does where there is no champion to compare with.
        key: names the decision, so that a repeated call keeps it once; empty = every call is one of its own.
        consent: what is asked before code is imported that the version's run file names. That is done only where the
            test images are to be read and the workload cannot be opened without its network (detection).

    Raises:
        UserError: there is no such version; or it needs code that nobody has consented to.
        TrackingError: MLflow is unreachable, or the files of a version are not those that were registered.
        DeviceError: the device cannot measure.
        ChampionMovedError: there was another champion after every comparison.
    """
    view = progress or Silent()
    chosen = registry.version(name, version or CHALLENGER, profile.name)
    if RUN_TAG not in chosen.tags:
        raise UserError(f"{chosen.uri} was not registered by Secateur: it has no gate of its run and no provenance")
    for attempt in range(ATTEMPTS):
        champion = registry.champion(name, profile.name)
        if champion is not None and champion.version == chosen.version:
            registry.repair(name)
            return Decision(name, chosen.version, profile.name, None, (), True, reason="it is the champion already")
        with tempfile.TemporaryDirectory(prefix="secateur-") as temporary:
            folder = Path(temporary)
            judged = partial(_rules, section=section, workload=workload, consent=consent)
            decision, files = _compare(
                registry, profile, target, chosen, champion, judged, noise_floor, recorded, folder, view
            )
            own = f"{key or secrets.token_hex(8)} {decision.version} {decision.champion or 'none'} {decision.device}"
            decision = replace(decision, run_id=registry.log_decision(decision, own, files))
        if not decision.passed:
            return decision
        try:
            registry.promote(name, chosen.version, profile.name, decision)
            return replace(decision, promoted=True)
        except ChampionMovedError:
            if attempt + 1 == ATTEMPTS:
                raise
    raise AssertionError("not reached")


def _compare(
    registry: Registry,
    profile: DeviceProfile,
    target: Target,
    chosen: Version,
    champion: Version | None,
    judged: Callable[[Contender], Rules],
    noise_floor: float | None,
    recorded: BenchmarkResult | None,
    folder: Path,
    progress: ProgressView,
) -> tuple[Decision, list[Path]]:
    """The decision, and the files it rests on. A version that holds what none of ours can is refused by a gate."""
    about = (chosen.name, chosen.version, profile.name, champion.version if champion else None)
    if chosen.tags.get("gate") != "passed":
        reason = f"the gate of the run that made it: {printable(cut(chosen.tags.get('gate', 'unknown')))}"
        return Decision(*about, (Gate("gate of its run", 0.0, 1.0, False, reason),)), []
    if champion is not None and MANIFEST_TAG not in champion.tags:
        if not registry.take_over:
            return Decision(*about, (Gate("champion", None, 1.0, False, _unproven(champion, profile.name)),)), []
        champion = None
    lost = registry.deleted_champion(chosen.name, profile.name) if about[3] is None else None
    if lost is not None and lost.earlier is not None:
        return Decision(*about, (Gate("champion", None, 1.0, False, _lost(chosen.name, profile.name, lost)),)), []
    contenders, gates = {}, []
    with progress.stage("Fetch challenger and champion"):
        for role, version in ((CHALLENGER, chosen), (CHAMPION, champion)):
            if version is not None:
                try:
                    contenders[role] = fetch(registry, version, folder / role)
                except VersionError as error:
                    gates.append(_content(role, error))
    if gates:
        return Decision(*about, tuple(gates)), []
    challenger, reigning = contenders[CHALLENGER], contenders.get(CHAMPION)
    try:
        parity, opened = _parity(challenger), judged(challenger)
    except VersionError as error:
        return Decision(*about, (_content(CHALLENGER, error),)), []
    rules, accuracy = opened.section, accuracy_gates(opened, challenger, reigning, progress)
    result, name = recorded, "compact"
    if result is None or reigning is not None:
        result, name = _measure(target, profile, challenger, reigning, noise_floor, rules, progress), CHALLENGER
    gates = [Gate("gate of its run", 1.0, 1.0, True), parity]
    if lost is not None:
        reason = f"version {lost.version} was champion and was deleted, and none before it is left to compare with"
        gates.append(Gate("champion", 1.0, 1.0, True, reason))
    gates += accuracy
    gates += absolute_gates(rules, profile, challenger, result, name)
    if rules.require_stable:
        gates.append(_stable(result))
    if reigning is not None:
        gates += relative_gates(rules, challenger, reigning, result)
    file = folder / "benchmark.json"
    write_whole(file, result.to_json() + "\n")
    return Decision(*about, tuple(gates)), [file]


def _unproven(champion: Version, device: str) -> str:
    """Why nothing is compared with a champion that somebody else made."""
    return (
        f"champion version {champion.version} was not made by Secateur, so nothing says what it is. To let another "
        f"take its place all the same, resume the run with tracking.take_over: true in its run.yaml, or remove alias "
        f"{alias_of(CHAMPION, device)}; a roll-back can go back to it"
    )


def _lost(name: str, device: str, lost: DeletedChampion) -> str:
    """Why nobody takes the place of a champion that was deleted before there is one again."""
    back = command("secateur", "rollback", name, "--device", device)
    return (
        f"champion version {lost.version} was deleted, so there is nothing to compare with. Restore the one before it, "
        f"version {lost.earlier}, with: {back}; then promote again"
    )


def _content(role: str, error: VersionError) -> Gate:
    """What a version holds that none of ours can."""
    way = "; roll back to the champion before it (`secateur rollback`)" if role == CHAMPION else ""
    return Gate(f"content of the {role}", None, 1.0, False, f"{error}{way}")


def fetch(registry: Registry, version: Version, folder: Path) -> Contender:
    """A version's files, verified, and its models run once.

    Raises:
        VersionError: it holds what no version of ours can.
    """
    manifest = registry.fetch(version, folder)
    network = folder / FOLDER / NETWORK
    model = folder / MODEL
    for file in (model, network) if network.is_file() else (model,):
        try:
            rehearse(file)
        except ExportError as error:
            raise VersionError(f"{file.name} of {version.uri} does not run: {_first_line(error)}") from error
    return Contender(version, model, network if network.is_file() else model, manifest.data)


def _rules(challenger: Contender, section: GateSection | None, workload: Workload | None, consent: Consent) -> Rules:
    """What a version is judged by: what is given, or what its own run file says.

    Raises:
        VersionError: nothing is given, and its run file says nothing.
    """
    if section is not None and workload is not None:
        return Rules(section, lambda: workload)
    name = f"run.yaml of {challenger.version.uri}"
    try:
        text = text_of(challenger.folder / "run.yaml")
        if text is None:
            raise UserError(f"there is no {name}")
        config = parse_run_file(text, name)
    except UserError as error:
        fault = VersionError(_first_line(error))
        if section is None:
            raise fault from error

        def closed() -> Workload:
            raise fault

        return Rules(section, closed if workload is None else lambda: workload)
    return Rules(
        section or config.gate,
        (lambda: _opened(config, challenger.version, consent)) if workload is None else lambda: workload,
    )


def _opened(config: RunFile, version: Version, consent: Consent) -> Workload:
    """The workload of a version's run file. Its network's code is looked for where its run did, else here.

    Raises:
        UserError: its data cannot be used here.
        ClosedError: it needs code, and there is no consent for that.
    """
    from secateur.pipeline.run.opening import open_workload

    reading = Reading(check="none")
    try:
        return open_workload(config, reading)
    except (trust.ClosedError, NotAdmittedError):
        directory = home() / "runs" / (version.run or "-")
        lay = read_origin(directory).get(FOLDER_OF_RUN)
        near, place = Path.cwd(), Path.cwd() / f"run.yaml of {version.name} version {version.version}"
        if isinstance(lay, str):
            near, place = Path(lay), directory / "run.yaml"
        config = config.lying_in(near)
        try:
            code = trust.code_of_workload(config, place)
            consent([] if code is None else [code])
        except UserError as error:
            raise trust.ClosedError(str(error)) from error
        return open_workload(config, reading)


def _measure(
    target: Target,
    profile: DeviceProfile,
    challenger: Contender,
    champion: Contender | None,
    noise_floor: float | None,
    rules: GateSection,
    progress: ProgressView,
) -> BenchmarkResult:
    """Both files, interleaved, in as many processes as their ratios need to be told from the limits.

    On the challenger's own input where postprocessing makes the input matter.
    """
    models = {} if champion is None else {CHAMPION: champion.model}
    models[CHALLENGER] = challenger.model
    inputs = challenger.folder / INPUTS
    same = champion is None or champion.data == challenger.data

    def decided(result: BenchmarkResult) -> bool:
        return not any(undecided(ratio, bound) for _, ratio, bound in ratios(rules, result))

    with progress.stage(f"Time on {profile.name}") as report:
        return measure(
            target,
            profile,
            models,
            "final",
            lambda done, total: report(done, total, ""),
            noise_floor=noise_floor,
            until=decided if champion is not None else None,
            inputs=inputs if inputs.is_file() and same else None,
        )


# -- gates -------------------------------------------------------------------------------------------------------------


def _parity(challenger: Contender) -> Gate:
    """What the export found when it compared the file with its PyTorch model."""
    told = challenger.facts("parity.json", ParityFacts)
    if told is None:
        return Gate("parity", None, 0.0, False, "the version carries no parity table")
    value, bound = told.compact.max_relative_error, told.compact.tolerance
    return Gate("parity", value, bound, told.compact.ok and value <= bound, "largest relative difference to PyTorch")


def accuracy_gates(
    rules: Rules, challenger: Contender, champion: Contender | None, progress: ProgressView
) -> list[Gate]:
    """Accuracy on the test split, at least; and how much less it is than the champion's, at most.

    Raises:
        ClosedError: the images can be read only with code that nobody has consented to.
    """
    section = rules.section
    wanted = [] if section.min_accuracy is None else [("accuracy", section.min_accuracy)]
    if champion is not None and section.max_drop_champion is not None:
        wanted.append(("accuracy drop", section.max_drop_champion))
    if not wanted:
        return []
    try:
        workload = _same_images(rules, challenger, champion)
        with progress.stage("Read the test split") as report:
            answered = [_answers(workload, c) for c in (challenger, champion) if c is not None]
            accuracies = resampled(workload, [answers for answers, _ in answered], answered[0][1])
            report(1, 1, f"{workload.metric} {accuracies[0, 0]:.4f}")
    except trust.ClosedError:
        raise
    except UserError as error:
        return [Gate(name, None, bound, False, str(error)) for name, bound in wanted]
    gates, metric = [], workload.metric
    for name, bound in wanted:
        drop = name == "accuracy drop"
        draws = accuracies[1] - accuracies[0] if drop else accuracies[0]
        value, (low, high) = float(draws[0]), _interval(draws[1:])
        judged = (high if drop else low) if section.sure else value
        ok = judged <= bound if drop else judged >= bound
        how = f"champion's {metric} less the challenger's" if drop else f"the challenger's {metric}"
        if low <= bound <= high and low < high:
            how += f"; not resolved by {number_of(len(answered[0][1]), 'image(s)')}"
        gates.append(Gate(name, value, bound, bool(ok), f"{how}, {len(draws) - 1} resamples", low, high))
    return gates


def _same_images(rules: Rules, challenger: Contender, champion: Contender | None) -> Workload:
    """The workload whose test images both can answer.

    Raises:
        UserError: there is none; says why.
    """
    try:
        workload = rules.open()
    except trust.ClosedError:
        raise
    except UserError as error:
        raise UserError(f"the test split cannot be read here: {_first_line(error)}") from error
    if workload.fingerprint != challenger.data:
        differing = _differing(challenger, workload.record.facts()["parts"])
        raise UserError(f"the data here is not the challenger's: {differing}")
    if champion is not None and champion.data != challenger.data:
        own = challenger.facts(FACTS, DataFacts)
        differing = _differing(champion, {} if own is None else own.parts)
        raise UserError(f"the champion was not made for the challenger's data: {differing}")
    return workload


def _answers(workload: Workload, contender: Contender) -> tuple[torch.Tensor, torch.Tensor]:
    """A version's answers on the test split.

    Raises:
        VersionError: they are none that the workload can judge.
    """
    try:
        judged = contender.model if workload.postprocessing is None else contender.network
        answers, targets = test_answers(workload, judged)
        workload.metrics(answers, targets)
    except (ExportError, RuntimeError, ValueError, IndexError, TypeError) as error:
        text = f"{contender.version.uri} does not answer the test images: {type(error).__name__}: {_first_line(error)}"
        raise VersionError(text) from error
    return answers, targets


def _differing(contender: Contender, parts: Mapping[str, str]) -> str:
    """What differs between the record of a version's data and another one, in words."""
    own = contender.facts(FACTS, DataFacts)
    if own is None:
        return "it was made by an earlier version of Secateur, which drew the splits in another way"
    names = [printable(cut(name)) for name, digest in own.parts.items() if parts.get(name) != digest]
    what = {"data": "images or splits"}
    return f"{' and '.join(what.get(name, name) for name in names) or 'something'} differ"


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def absolute_gates(
    section: GateSection, profile: DeviceProfile, challenger: Contender, result: BenchmarkResult, name: str
) -> list[Gate]:
    """Milliseconds and bytes, against the run file's limits and the device's budgets."""
    size = float(challenger.model.stat().st_size)
    values = {
        "p50_ms": result.p50_ms(name),
        "p95_ms": result.p95_ms(name),
        "size_bytes": size,
        "peak_rss_bytes": result.peak_rss_bytes(name),
    }
    limits = profile.budgets.model_dump() if section.budgets else {}
    for key, own in (("p95_ms", section.max_p95_ms), ("peak_rss_bytes", section.max_peak_rss_bytes)):
        limits[key] = min((limit for limit in (own, limits.get(key)) if limit is not None), default=None)
    gates = []
    for key, limit in limits.items():
        if limit is not None:
            value = values.get(key)
            reason = f"on {profile.name}" if value is not None else f"{profile.name} does not tell it"
            gates.append(Gate(key, value, float(limit), value is not None and value <= limit, reason))
    return gates


def relative_gates(
    section: GateSection, challenger: Contender, champion: Contender, result: BenchmarkResult
) -> list[Gate]:
    """The challenger by the champion: what is surely (95 %) within the limit passes.

    Sizes are exact. A reading that the device does not give is unknown, which is no pass.
    """
    gates = [_no_larger(name, ratio, bound, len(result.processes)) for name, ratio, bound in ratios(section, result)]
    if section.max_resource_increase is not None:
        size = challenger.model.stat().st_size / champion.model.stat().st_size
        gates.append(_no_larger("size ratio", Ratio(size, size, size), 1 + section.max_resource_increase, 1))
    return gates


def ratios(section: GateSection, result: BenchmarkResult) -> list[tuple[str, Ratio | None, float]]:
    """(name, challenger / champion, bound) of everything that is compared by measuring; None = the device does not tell
    it."""
    rows: list[tuple[str, Ratio | None, float]] = []
    clock = f"{result.statistic}_ms"
    if section.max_latency_increase is not None:
        bound = 1 + section.max_latency_increase
        rows.append(("p50 ratio", result.ratio(CHALLENGER, CHAMPION), bound))
        rows.append(("p95 ratio", paired(result, lambda model: float(np.percentile(getattr(model, clock), 95))), bound))
    if section.max_resource_increase is not None:
        bound = 1 + section.max_resource_increase
        rows.append(("first call ratio", paired(result, lambda model: model.first_ms), bound))
        rows.append(("peak RSS ratio", paired(result, lambda model: model.peak_rss_bytes), bound))
    return rows


def undecided(ratio: Ratio | None, bound: float) -> bool:
    """Whether a ratio's interval contains the bound, so that more processes could tell."""
    return ratio is not None and ratio.low <= bound < ratio.high


def _no_larger(name: str, ratio: Ratio | None, bound: float, count: int) -> Gate:
    """A ratio challenger / champion that is within its bound for sure: its interval's upper end is."""
    if ratio is None:
        return Gate(name, None, bound, False, "the device does not tell it; set the limit to null to do without")
    reason = "challenger / champion, upper end of the interval"
    if undecided(ratio, bound):
        needed = processes_that_tell(ratio, bound, count)
        about = f"more than {needed:,}" if needed >= MANY_PROCESSES else f"about {needed:,}"
        reason = f"unknown after {count}: {about} processes would tell (final.max_processes of the device profile)"
    ends = (ratio.low, ratio.high) if ratio.known else (None, None)
    return Gate(name, ratio.value, bound, ratio.high <= bound, reason, *ends)


def _stable(result: BenchmarkResult) -> Gate:
    """No process that counts was disturbed."""
    disturbed = float(len(result.disturbed))
    reason = f"processes that count although the device was {'; '.join(sorted(set(result.disturbed)))}"
    if not disturbed:
        return Gate(STABLE, 0.0, 0.0, True, "disturbed processes that count")
    return Gate(STABLE, disturbed, 0.0, False, f"{reason}; try again when it is idle (gate.require_stable)")


def paired(result: BenchmarkResult, reading: Callable[[Any], float | None]) -> Ratio | None:
    """Challenger / champion of a reading that every process gives once; None = not every process gives it."""
    pairs = [(reading(p.models[CHALLENGER]), reading(p.models[CHAMPION])) for p in result.processes]
    known = [a / b for a, b in pairs if a and b]
    return of_processes(known) if len(known) == len(pairs) else None


# -- the test split ----------------------------------------------------------------------------------------------------


def test_answers(workload: Workload, onnx_file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of an ONNX file on the test split, shape (n, ...), and the targets: the one reader of that split.

    Images go through the file in batches where that was proven to give the same (``export.batching``).
    """
    split, answers, targets = workload.test, [], []
    example = workload.example_input()
    predict = Predictor(onnx_file, threads=min(torch.get_num_threads(), usable_cores()))
    bytes_each = 4 * (example.numel() + predict(example.numpy()).size)
    chunk = max(1, CHUNK_BYTES // bytes_each)
    for start in range(0, len(split), chunk):
        part = Split(split.source, split.indices[start : start + chunk])
        every = torch.arange(len(part))
        images, labels = workload.batch(part, every, train=False, generator=None, device=torch.device("cpu"))
        answers.append(workload.answers(torch.from_numpy(predict(images.contiguous().numpy())), labels))
        targets.append(labels)
    return torch.cat(answers), torch.cat(targets)


def resampled(
    workload: Workload,
    answers: Sequence[torch.Tensor],
    targets: torch.Tensor,
    *,
    draws: int = RESAMPLES,
    seconds: float = RESAMPLING_S,
) -> np.ndarray:
    """The workload's metric of several models on bootstrap samples of the same images (Efron & Tibshirani 1993, 10.3).

    Args:
        answers: of each model, shape (n, ...).
        targets: shape (n, ...).
        draws: resamples, at most.
        seconds: after which there are no more, but for the least.

    Returns:
        shape (models, 1 + resamples); first the metric itself.
    """
    generator, deadline = torch.Generator().manual_seed(0), time.monotonic() + seconds
    columns = [[workload.metrics(a, targets)[workload.metric] for a in answers]]
    while len(columns) <= draws and (time.monotonic() < deadline or len(columns) <= MIN_RESAMPLES):
        rows = torch.randint(len(targets), (len(targets),), generator=generator)
        columns.append([workload.metrics(a[rows], targets[rows])[workload.metric] for a in answers])
    return np.array(columns, dtype=np.float64).T


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
