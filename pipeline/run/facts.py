"""What the stages of a run find: one frozen dataclass a stage, and the one place where they become JSON and are read.

In JSON a number that is none (NaN) or infinite is ``null``; a field marked ``OMITTED`` is left out while it is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Annotated, Any, Generic, Self, TypeVar, get_type_hints

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, TypeAdapter

from secateur.device_profiles.network_probe import NetworkProbe
from secateur.device_profiles.wording import number_of
from secateur.export.artifact import ExportedModel
from secateur.pipeline.devices.device import RunDevice
from secateur.pipeline.run.records import describe, to_candidate, to_dict, to_evaluation
from secateur.pipeline.tracking import Decision
from secateur.pipeline.training.curve import Fitted
from secateur.pruning.search.protocol import Entry, Evaluation
from secateur.pruning.search.scope import ScopeChoice

EARLIER_NAMES = {"gate": "judge"}
"""Stages that had another name: for one release it is still read, and written beside the new one in ``report.json``."""

Part = TypeVar("Part")
Number = int | float  # both, so that pydantic leaves each as it is
OMITTED = Field(exclude_if=lambda value: value is None)


def _read_evaluation(data: Mapping[str, Any]) -> Evaluation:
    known = {name: value for name, value in data["metrics"].items() if value is not None}
    return to_evaluation({**data, "metrics": known})


def _read_entry(data: Mapping[str, Any]) -> Entry:
    return Entry(to_candidate(data["candidate"]), _read_evaluation(data["evaluation"]))


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {"candidate": describe(entry.candidate), "evaluation": to_dict(entry.evaluation)}


KeptEvaluation = Annotated[Evaluation, PlainValidator(_read_evaluation), PlainSerializer(to_dict)]
KeptEntry = Annotated[Entry, PlainValidator(_read_entry), PlainSerializer(_entry_json)]
KeptDecision = Annotated[Decision, PlainSerializer(Decision.to_dict)]


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What every stage adds.

    Args:
        files: the files it made, as paths within the run directory, with the sha256 of each.
    """

    files: Mapping[str, str]


@dataclass(frozen=True)
class Both(Generic[Part]):
    """The same of both networks."""

    baseline: Part
    compact: Part

    def __iter__(self) -> Iterator[Part]:
        return iter((self.baseline, self.compact))

    def items(self) -> tuple[tuple[str, Part], ...]:
        """Each with the name of its network."""
        return ("baseline", self.baseline), ("compact", self.compact)


# -- baseline and search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BaselineFacts(StageFacts):
    """The unpruned network.

    Args:
        origin: where its weights come from, for people.
        training: how it was trained; None where its weights came trained.
    """

    origin: str
    training: Annotated[Fitted | None, OMITTED] = None


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Whether two networks compute the same.

    Args:
        max_relative_error: largest difference over the largest magnitude; None = they could not be compared.
        reason: what is wrong; empty when ok.
    """

    ok: bool
    max_relative_error: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RankAgreement:
    """How alike two metrics rank the candidates of a search.

    Args:
        stand_in: the metric that the search went by.
        metric: the workload's own.
        spearman: their rank correlation.
        candidates: that have both.
    """

    stand_in: str
    metric: str
    spearman: float | None
    candidates: int


@dataclass(frozen=True, kw_only=True)
class LatencyFacts:
    """How a search came to its latencies; the figures from ``median_error`` on say what the latency model is worth.

    Args:
        measured: plans timed on the device.
        predicted: plans that the latency model answered for.
        trusted: whether the model was good enough to be asked.
        samples: measurements that the model learned from.
        errors: its median error by what all widths are multiples of.
        devices: the same for each of several devices, by name.
        precisions: the same for each precision that may ship besides fp32, by name.
    """

    measured: int
    predicted: int
    trusted: bool
    median_error: Annotated[float | None, OMITTED] = None
    spearman: Annotated[float | None, OMITTED] = None
    half_width: Annotated[float | None, OMITTED] = None
    samples: Annotated[int | None, OMITTED] = None
    errors: Annotated[Mapping[int, float] | None, OMITTED] = None
    devices: Annotated[Mapping[str, LatencyFacts] | None, OMITTED] = None
    precisions: Annotated[Mapping[str, LatencyFacts] | None, OMITTED] = None

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> LatencyFacts:
        """What ``Evaluator.latency_report`` says."""
        nested = {
            key: {name: cls.of(each) for name, each in report[key].items()}
            for key in ("devices", "precisions")
            if report.get(key) is not None
        }
        return cls(**{**report, **nested})


@dataclass(frozen=True, kw_only=True)
class SearchSplitFacts:
    """What the search went by, and how well the unpruned network knows the search images.

    Args:
        metric: what the search went by.
        accuracy: of the unpruned network on them, by the workload's own metric; None where it was trained without them.
        augmented: the same on augmented ones.
        memorised: whether the first is so much higher that the weights were trained on them.
    """

    metric: str
    accuracy: float | None
    augmented: float | None
    memorised: bool


@dataclass(frozen=True, kw_only=True)
class ScopeFacts:
    """Which groups the search could cut.

    Args:
        asked: ``search.scope``.
        chosen: ``inner`` or ``all``.
        reason: for people; empty where nothing was to be chosen.
        trials: the cuts that were compared (``secateur.pruning.search.scope.ScopeTrial``).
    """

    asked: str
    chosen: str
    reason: str
    trials: tuple[Mapping[str, str | Number | None], ...] = ()

    @classmethod
    def of(cls, asked: str, choice: ScopeChoice) -> ScopeFacts:
        """Of a choice that was made."""
        trials = tuple(asdict(trial) for trial in choice.trials)
        return cls(asked=asked, chosen=choice.scope, reason=choice.reason, trials=trials)


@dataclass(frozen=True, kw_only=True)
class LayerPrecisions:
    """Precisions that are tried for every candidate where its layers may differ, and why.

    Args:
        tried: their names; ``int8 except conv1`` leaves the layer ``conv1`` in float.
        sensitivity: precision -> layer -> relative error of the outputs where that layer alone has it.
    """

    tried: tuple[str, ...]
    sensitivity: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class SearchFacts(StageFacts):
    """What the search found.

    Args:
        reference: the unpruned network's evaluation, its accuracy in float32.
        archive: the search's result, best first.
        num_candidates: how many the method evaluated.
        scope: None where it was given its plan.
        agreement: None where the search went by the workload's own metric, or too few candidates have both.
        spent: running totals (``evaluations``, ``epochs``, ``seconds``, ``images_forwarded`` ...).
        device: the run's own device.
        devices: every device, where there are several.
        certificate: of a cut through every group that was searched.
        graph: the channel groups, for people.
        split: what the search went by, and why; None in runs of earlier versions.
        probes: which widths of this network pay, by device; None where none was probed with it.
        layer_precisions: the mixtures of precisions that were tried; None where layers may not differ.
        precision_latency: precision of integers -> device -> latency of the unpruned network over that in fp32.
    """

    reference: KeptEvaluation
    archive: tuple[KeptEntry, ...]
    num_candidates: int
    scope: Annotated[ScopeFacts | None, OMITTED] = None
    agreement: RankAgreement | None
    spent: Mapping[str, Number]
    latency: LatencyFacts
    device: RunDevice
    devices: Annotated[Mapping[str, RunDevice] | None, OMITTED] = None
    certificate: Proof
    graph: str
    split: Annotated[SearchSplitFacts | None, OMITTED] = None
    probes: Annotated[Mapping[str, NetworkProbe] | None, OMITTED] = None
    layer_precisions: Annotated[LayerPrecisions | None, OMITTED] = None
    precision_latency: Annotated[Mapping[str, Mapping[str, Number]] | None, OMITTED] = None


@dataclass(frozen=True, kw_only=True)
class ControlFacts:
    """What the choice of a plan is worth, before any fine-tuning; on the search split.

    Args:
        uniform: the control at equal MACs, in the same groups.
        chosen: the plan of the compact network, cut from the same unpruned weights.
        uniform_latency, chosen_latency: ratios to the unpruned network, measured; None in runs of earlier versions.
    """

    uniform: KeptEntry
    chosen: KeptEntry
    uniform_latency: Annotated[float | None, OMITTED] = None
    chosen_latency: Annotated[float | None, OMITTED] = None


@dataclass(frozen=True, kw_only=True)
class WidthsFacts:
    """What widths that are finer than the device's steps cost there.

    Args:
        latency_ratio: of the compact network, measured.
        rounded_latency_ratio: of the same with every width at the nearest one that suits the device.
        rounded_macs_ratio: of that network.
        groups: with another width then.
    """

    latency_ratio: float
    rounded_latency_ratio: float
    rounded_macs_ratio: float
    groups: int

    @property
    def text(self) -> str:
        """The same as a sentence."""
        return (
            f"Widths are finer than the device's steps: the compact network takes {self.latency_ratio:.3f} of the "
            f"unpruned latency, and with {number_of(self.groups, 'width(s)')} rounded to those steps it would take "
            f"{self.rounded_latency_ratio:.3f} at {self.rounded_macs_ratio:.3f} of the MACs."
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneFacts(StageFacts):
    """The fine-tuned plans, and the best of them: the compact network.

    Args:
        control: None where no uniform plan has so few MACs, or one of both could not be evaluated.
        widths: None where they are the device's own.
        training: how the compact network was fine-tuned; None in runs of earlier versions.
    """

    best: KeptEntry
    finals: tuple[KeptEntry, ...]
    control: Annotated[ControlFacts | None, OMITTED] = None
    widths: Annotated[WidthsFacts | None, OMITTED] = None
    training: Annotated[Fitted | None, OMITTED] = None


# -- export and benchmark ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParityFacts(Proof):
    """An ONNX file compared with its PyTorch network.

    Args:
        argmax_agreement: share of rows with the same argmax.
        samples: inputs compared.
    """

    argmax_agreement: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class ResultParity:
    """Results behind postprocessing, of ONNX and of PyTorch, compared.

    Args:
        largest_error: of what was compared; its unit is the postprocessing's own.
        compared: results that both have.
        differing: results that only one has.
        reason: what is wrong; empty when ok.
        counts: how much was found in each image.
    """

    ok: bool
    largest_error: float | None
    compared: int
    differing: int
    reason: str
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExportedNetwork:
    """One network as ONNX.

    Args:
        artifact: the file of the network alone.
        parity: of the file in fp32 with the PyTorch network.
        rounded: of the file in the precision that was chosen, which is made of that one; None = that is fp32.
        whole: the file with postprocessing behind it, where the workload has some.
        postprocessing: how the results of that file compare.
    """

    artifact: ExportedModel
    parity: ParityFacts
    rounded: Annotated[ParityFacts | None, OMITTED] = None
    whole: Annotated[ExportedModel | None, OMITTED] = None
    postprocessing: Annotated[ResultParity | None, OMITTED] = None

    @property
    def files(self) -> dict[str, str]:
        """The network's files with the sha256 of each."""
        return {model.path.name: model.sha256 for model in (self.artifact, self.whole) if model is not None}


@dataclass(frozen=True, kw_only=True)
class ProofHop:
    """One step on the way from the unpruned network in PyTorch to a file on a device.

    Args:
        name: of the step.
        expected, found: what was compared with what, in words.
        error: largest relative difference; None = infinite, or it could not be run.
        tolerance: that it may have; None = any, as in int8, where the metric tells.
        metric_expected, metric: the workload's of both, on the same images of the search split; None = not taken. The
            metric is of the very network or file.
        samples: images.
        reason: what is wrong; empty where the step holds.
        tensor: the first one inside of the network that differs, with its layer; empty = none was found, or it holds.
    """

    name: str
    expected: str
    found: str
    error: Number | None
    tolerance: Number | None
    metric_expected: Number | None = None
    metric: Number | None = None
    samples: int = 0
    reason: str = ""
    tensor: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True, kw_only=True)
class ExportFacts(StageFacts):
    """Both networks as ONNX.

    Args:
        certificate: of the cut that became the compact network.
        usage: how images are prepared and outputs read, as ``Workload.usage`` says it.
        hops: from the unpruned network in PyTorch to the files; None in runs of earlier versions.
        schemes: device -> number types of its own file, ``compact.SCHEME.onnx``; None = ``compact.onnx`` is for all.
    """

    baseline: ExportedNetwork
    compact: ExportedNetwork
    certificate: Proof
    usage: Mapping[str, Any]
    hops: Annotated[tuple[ProofHop, ...] | None, OMITTED] = None
    schemes: Annotated[Mapping[str, str] | None, OMITTED] = None

    def file(self, name: str, device: str, kind: str = "") -> str:
        """Which file of a network is for a device.

        Args:
            name: ``baseline`` or ``compact``.
            kind: what is behind it in the file's name (``.detections``).
        """
        scheme = (self.schemes or {}).get(device) if name == "compact" else None
        return f"{name}{f'.{scheme}' if scheme else ''}{kind}.onnx"

    @property
    def networks(self) -> Both[ExportedNetwork]:
        return Both(self.baseline, self.compact)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Figures of a timed network; None = the device does not tell."""

    p50_ms: float
    p95_ms: float
    cpu_p50_ms: float
    cpu_p95_ms: float
    load_ms: float
    first_ms: float
    peak_rss_bytes: int | None
    energy_mj: Annotated[float | None, OMITTED] = None


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times faster the compact network is, with the 95 % interval; None = too few processes for one."""

    low: float | None
    high: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Both networks timed in turn on one device.

    Args:
        flags: what disturbed the timing.
    """

    latency: Both[Timing]
    speedup: Speedup
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TimedResults(Timed):
    """Both networks timed with postprocessing.

    Args:
        name: of the postprocessing.
        found: how much the baseline finds in the image they were timed on.
    """

    name: str
    found: int


@dataclass(frozen=True, kw_only=True)
class TimedOnDevice(Timed):
    """All that was timed on one device.

    Args:
        statistic: what the speed-up is a ratio of, ``cpu`` or ``wall`` time.
    """

    statistic: str
    postprocessing: Annotated[TimedResults | None, OMITTED] = None


@dataclass(frozen=True, kw_only=True)
class Hop:
    """A network's file on a device, in one of its runtimes, compared with ONNX Runtime on this machine.

    Args:
        network: ``baseline`` or ``compact``.
        error: largest relative difference; None = infinite, or it could not be run.
        tolerance: that it may have; None = any, as in int8, where the metric tells.
        metric: the workload's, of the answers there; None = it could not be run.
        metric_here: the same of the answers here, on the same images.
        samples: images.
        reason: what is wrong; empty where the hop holds.
        tensor: the first one inside of the network that differs; empty = none was found, or the hop holds.
    """

    network: str
    device: str
    runtime: str
    error: Number | None
    tolerance: Number | None
    metric: Number | None
    metric_here: Number | None
    samples: int
    reason: str = ""
    tensor: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True, kw_only=True)
class InRuntime:
    """A device in a further runtime.

    Args:
        timed: None = it cannot run these networks.
        precision: what the compact network's layers really computed in; None = the runtime does not tell.
        reason: why it was not timed; empty where it was.
    """

    device: str
    runtime: str
    timed: TimedOnDevice | None
    precision: str | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SustainedFacts:
    """The compact network called without a pause on the run's own device.

    Args:
        seconds: how long.
        calls: in all.
        first_p50_ms, last_p50_ms: median of the first and the last tenth of the seconds (one at least).
        temperature_c: at the beginning, the highest, at the end; None = the device does not tell.
        freq_mhz: clock at the beginning, the lowest, at the end; None = the device does not tell.
    """

    seconds: float
    calls: int
    first_p50_ms: float
    last_p50_ms: float
    temperature_c: Annotated[tuple[float, float, float] | None, OMITTED] = None
    freq_mhz: Annotated[tuple[float, float, float] | None, OMITTED] = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkFacts(TimedOnDevice, StageFacts):
    """What was timed on the run's own device.

    Args:
        device: its name.
        fleet: what was timed on each device, the run's own too, where there are several.
        runtimes: each device in each of ``device.runtimes``; None where there are none.
        hops: files on devices whose numbers are not those that the export was checked with; None where there are none.
        sustained: None where none was asked for (``device.sustain_s``), or the device could not do it.
    """

    device: str
    fleet: Annotated[Mapping[str, TimedOnDevice] | None, OMITTED] = None
    runtimes: Annotated[tuple[InRuntime, ...] | None, OMITTED] = None
    hops: Annotated[tuple[Hop, ...] | None, OMITTED] = None
    sustained: Annotated[SustainedFacts | None, OMITTED] = None

    @property
    def of_devices(self) -> Mapping[str, TimedOnDevice]:
        """What was timed on each device, whether there is one or several."""
        return {self.device: self} if self.fleet is None else self.fleet


# -- gate, report, registry --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A network at the end of a run; one level in JSON, the metrics first.

    Args:
        metrics: on the test split; None = not a number.
    """

    metrics: Mapping[str, Number | None]
    macs: int
    params: int
    size_bytes: int
    timing: Timing

    def __getitem__(self, metric: str) -> float:
        """A metric by name; NaN where it is unknown."""
        value = self.metrics.get(metric)
        return float("nan") if value is None else value

    @property
    def size(self) -> dict[str, int]:
        """What a network costs, however fast the device."""
        return {"macs": self.macs, "params": self.params, "size_bytes": self.size_bytes}

    def flat(self) -> dict[str, Number | None]:
        """Every figure by its name."""
        timing = {name: value for name, value in asdict(self.timing).items() if (name, value) != ("energy_mj", None)}
        return {**self.metrics, **self.size, **timing}

    @staticmethod
    def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``flat``, for pydantic to read."""
        timing = {field.name: flat[field.name] for field in fields(Timing) if field.name in flat}
        size = {name: flat[name] for name in ("macs", "params", "size_bytes")}
        metrics = {name: value for name, value in flat.items() if name not in timing and name not in size}
        return {"metrics": metrics, **size, "timing": timing}


KeptModel = Annotated[ModelFacts, BeforeValidator(ModelFacts.nested), PlainSerializer(ModelFacts.flat)]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of the gate.

    Args:
        value: what was found; None = unknown, and then it does not hold.
        relation: ``<=`` or ``>``.
        bound: what it was compared with.
    """

    name: str
    value: Number | None
    relation: str
    bound: Number
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with the ends of its 95 % interval; None = it cannot be told."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class AccuracyFacts:
    """How sure the metric on the test split is: a paired bootstrap over its images.

    Args:
        images: of the test split.
        draws: samples of them.
        baseline, compact: the metric of each network.
        change: the compact network's less the baseline's, on the same samples.
        reason: why there is no interval; empty where there is one.
    """

    images: int
    draws: int
    baseline: Interval
    compact: Interval
    change: Interval
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class GateFacts(StageFacts):
    """Whether the run reached what its run file asks for.

    Args:
        metric: the metric the gate looks at.
        search_metric: the metric the search went by.
        others: further metrics that a task shows: name -> (unit, whether "higher" or "lower" is better).
        accuracy: how sure the metric is; None in runs of earlier versions.
        hops: every step from the unpruned network in PyTorch to the files on the devices; None in runs of earlier
            versions.
        broken: the first hop that does not hold, in a sentence; None = all hold.
    """

    models: Both[KeptModel]
    checks: tuple[Check, ...]
    passed: bool
    metric: str
    search_metric: str
    others: Annotated[Mapping[str, tuple[str, str]] | None, OMITTED] = None
    accuracy: Annotated[AccuracyFacts | None, OMITTED] = None
    hops: Annotated[tuple[ProofHop, ...] | None, OMITTED] = None
    broken: Annotated[str | None, OMITTED] = None

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.ok)


@dataclass(frozen=True, kw_only=True)
class ReportFacts(StageFacts):
    """The report.

    Args:
        html: name of the page.
        front: candidates on the Pareto front.
    """

    html: str
    front: int


@dataclass(frozen=True, kw_only=True)
class RegisterFacts(StageFacts):
    """The registered version."""

    name: str
    version: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class PromoteFacts(StageFacts):
    """What became of the version.

    Args:
        promoted: it is the champion of all its devices.
        devices: what was decided on each.
        reason: why nothing was decided.
    """

    promoted: bool
    devices: Mapping[str, KeptDecision]
    reason: str


class Facts:
    """What the stages of a run found so far, each under the stage's name.

    Asking for a stage that is not done raises AttributeError. Those that need the tracking server may be left out of a
    run that went to its end otherwise: then they are None.
    """

    baseline: BaselineFacts
    search: SearchFacts
    finetune: FinetuneFacts
    export: ExportFacts
    benchmark: BenchmarkFacts
    gate: GateFacts
    report: ReportFacts
    register: RegisterFacts | None = None
    promote: PromoteFacts | None = None

    def __init__(self, **done: StageFacts) -> None:
        vars(self).update(done)

    def plus(self, **done: StageFacts) -> Self:
        """These and more."""
        return type(self)(**{**vars(self), **done})

    def only(self, names: tuple[str, ...]) -> Self:
        """Those of some stages, as far as these are done."""
        return type(self)(**{name: facts for name, facts in vars(self).items() if name in names})

    @property
    def trainings(self) -> dict[str, Fitted]:
        """How the networks were trained, as far as that is known."""
        both = {"baseline": self.baseline.training, "compact": self.finetune.training}
        return {name: fitted for name, fitted in both.items() if fitted is not None}

    def to_json(self) -> dict[str, Any]:
        """Made of JSON's types."""
        return {name: to_json(facts) for name, facts in vars(self).items()}


def to_json(facts: StageFacts) -> dict[str, Any]:
    """A stage's facts, made of JSON's types; floats are kept to the last digit."""
    kind: Any = type(facts)
    text = json.dumps(_adapter(kind).dump_python(facts, mode="json"))
    data: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return data


def from_json(stage: str, data: Mapping[str, Any]) -> StageFacts:
    """The inverse of ``to_json``; what an earlier version of Secateur wrote besides is left out.

    Args:
        stage: its name.

    Raises:
        ValueError: these are no facts of this stage.
    """
    try:
        facts: StageFacts = _adapter(get_type_hints(Facts)[stage]).validate_python(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no facts of the stage {stage}: {error!r}") from error
    return facts


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
