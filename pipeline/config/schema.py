"""The run file: its sections and keys, with what each may be.

``workload`` and ``search.options`` have schemas of their own, which live beside the code they configure
(``pipeline/workloads`` and ``pruning/search/methods``), so a new method or workload is one new file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from secateur.pipeline.config import recipes
from secateur.pipeline.config.renamed import with_first_words
from secateur.pipeline.errors import is_secret

Fraction = Annotated[float, Field(gt=0, le=1)]
RECALIBRATION_IMAGES = 512
"""Training images for a candidate's batch-norm statistics, where the run file says nothing."""


class Section(BaseModel):
    """A part of the run file: immutable, and it refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that came when there were run directories already: at their default they are no part of the digest, so those
    runs can still be resumed."""
    passing: ClassVar[frozenset[str]] = frozenset()
    """Keys that change no result, and so are no part of the digest: they may be another when a run is resumed."""
    formerly: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys that were renamed -> what they were called, which is what the digest goes on calling them."""


class Distillation(Section):
    """Learning from the unpruned baseline: loss = (1 - weight) * task loss + weight * T^2 * KL(teacher || student)."""

    later = frozenset({"features", "feature_layers"})
    weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the loss that is the teacher's; the rest is the task's own."""
    temperature: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """T, by which both networks' logits are divided."""
    features: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Weight of the distance between both networks' features (mean squared error over the mean square), added to the
    loss; 0 = none. They are compared where both have the same shape: it needs ``search.scope: inner``."""
    feature_layers: tuple[str, ...] = ()
    """Layers whose outputs are compared, with ``*`` and ``?``; empty = every block."""


class Recipe(Section):
    """How a network is trained: optimizer, learning rate over time, and what stands against overfitting."""

    passing = frozenset({"recipe", "num_workers", "cache_mb", "compile"})
    formerly = MappingProxyType({"autocast": "precision"})
    later = frozenset({"optimizer", "weight_decay_on", "schedule", "milestones", "milestone_factor"}) | {
        *("warmup_steps", "accumulate", "keep", "mixup", "cutmix", "sync_batchnorm")
    }
    recipe: recipes.Name | None = None
    """A recipe by name, for the keys that are not given: quick = a first result; standard = SGD with label smoothing
    and a moving average; long = the same, 200 epochs, the best is kept; steps = the schedule of the ResNet paper; adamw
    = the standard one with AdamW, for transformers and hybrids. null = the defaults below."""
    epochs: Annotated[float, Field(gt=0, le=100_000)] = 10
    """Passes over the training images; fractions count."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd = with Nesterov momentum; adamw = Adam with decoupled weight decay, which begins with lr 0.001, weight_decay
    0.05 and weight_decay_on: weights where these are not given."""
    lr: Annotated[float, Field(gt=0, le=1000)] = 0.05
    """Highest learning rate, after the warm-up."""
    batch_size: Annotated[int, Field(gt=0, le=1_000_000)] = 128
    """Images of one training step."""
    accumulate: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Parts of a batch that pass the network one after the other, their gradients added up: less memory for the same
    step. Batch norm normalises each part by itself."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov momentum of SGD; AdamW's first beta."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 5e-4
    """L2 penalty on the weights."""
    weight_decay_on: Literal["all", "weights"] = "all"
    """all = every parameter decays; weights = biases and the scales of norms (parameters of one dimension) do not."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """The learning rate after the warm-up: cosine = down to zero; step = times milestone_factor at each milestone;
    constant = as it is."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Of the schedule step: shares of the training."""
    milestone_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the schedule step: factor on the learning rate at each milestone."""
    warmup_epochs: Annotated[float, Field(ge=0, le=100_000)] = 0.5
    """Epochs in which the learning rate rises from zero; at most half of the training, at least one step."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """The same in steps; null = warmup_epochs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that targets spread over all classes."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Blend the images of a batch in pairs, and their classes in the same share, which a Beta distribution with this
    alpha draws (0.2 is usual); 0 = off. Classification only."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Put a rectangle of one image into another, and mix their classes by its area, which a Beta distribution with this
    alpha draws (1 is usual); 0 = off. With mixup, one of the two is drawn for each batch. Classification only."""
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Largest norm of the gradient of all weights together; None = gradients are not clipped."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Keep an exponential moving average of the weights with this decay per step, and end with it; 0 = off. The first
    steps count more: the decay begins near 0.1 and rises to this."""
    keep: Literal["last", "best"] = "last"
    """last = training ends with its last weights; best = with those of the epoch whose metric on the search split was
    highest, each epoch judged."""
    autocast: Literal["fp32", "bf16", "auto"] = "auto"
    """The numbers it computes in: bf16 = mixed precision; auto = fp32, or bf16 where the hardware multiplies it
    natively and steps of this network take a tenth less time in it. Trained weights, and so figures, are then a
    little different on other processors; fp32 for the same recipe on all of them."""
    sync_batchnorm: bool = False
    """Batch norm normalises by the batches of all GPUs together (PyTorch's SyncBatchNorm) instead of each part by
    itself: for small parts. Only where several GPUs train (``compute_count``), and refused elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether networks are trained with ``torch.compile``, on a GPU; on a processor they never are. auto = where a
    few steps of each kind, tried once for a network and processor, say that the training is clearly shorter,
    compiling included. Weights differ by rounding, as they do between processors; a network that cannot be compiled is
    trained as it is."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Processes that read training images; how many there are changes no result. None = where reading takes long, one
    for every four cores, or, where a GPU trains, one for every core but one."""
    cache_mb: Annotated[int, Field(ge=0, le=10**8)] | None = None
    """Memory for training images that were read or decoded once, in MB; changes no result. None = a quarter of what is
    free; 0 = none."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return recipes.completed(given) if isinstance(given, dict) else given


PortName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,99}$")]


class DeviceSection(Section):
    """The device to prune for: a profile by name (``secateur list devices``) or the path of a YAML file."""

    later = frozenset({"others", "combine", "runtimes", "sustain_s"})
    passing = frozenset({"wait_s"})
    profile: str = "local"
    """Name of a device profile, or the path of a YAML file."""
    others: tuple[str, ...] = ()
    """More devices: each candidate is measured on all of them at once, and the gate asks the same of each."""
    runtimes: tuple[str, ...] = ()
    """Further runtimes (``openvino``, ``ncnn`` ...) in which both networks are timed at the end, on every device. The
    search goes by the profile's own; the report compares. Each must be installed there, which is asked before the
    search."""
    combine: Literal["worst", "mean"] = "worst"
    """The latency ratio that targets and rewards see where there are several devices: the worst, or the mean."""
    wait_s: Annotated[float, Field(ge=0, le=1e8)] = 0.0
    """Seconds a device may be unreachable, at a time, before the run ends with exit code 4; 0 = none. A scheduled run
    may want hours. It may be changed in a run's ``run.yaml`` before ``secateur resume``."""
    sustain_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """Seconds in which the compact network is called without a pause on the device, after it was timed; 0 = it is not.
    The report shows each second's latency with temperature and clock: whether heat slows the device down."""
    channel_multiple: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Widths are multiples of it; None = what a probe of the device with this network found per channel group, a probe
    of the device per kind of layer, or else the profile's. A group too small for two steps uses half of it, and so
    on."""
    probe: bool = True
    """Probe a device that was never probed, at the start of the run: where its latency steps with width (under a minute
    on a PC); and, where the target or the reward looks at latency, with the run's own network, once for each network:
    which widths pay in it (two minutes at most, for a short search ten seconds). False = use kept ones, or else
    the profile's ``channel_multiple``."""


class TargetSection(Section):
    """When the search may stop; ratios to the unpruned network."""

    macs_ratio: Fraction | None = None
    """MACs to be reached; None = no such target."""
    latency_ratio: Fraction | None = None
    """Latency on the device to be reached; None = no such target."""


class BudgetSection(Section):
    """What the search may spend; None = no such limit. The search ends at its target with what it has found by then."""

    later = frozenset({"work"})

    evaluations: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Candidates evaluated, fine-tuned ones included."""
    seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Nothing begins after so many seconds of search (what is under way is finished, and one plan is evaluated)."""
    epochs: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Epochs of training during the search; a training that would overrun is shortened."""
    work: Annotated[float, Field(gt=0, le=1e24)] | None = None
    """Image-MACs: images times the MACs of the network they pass (a candidate's, at its widths), three times that in
    training. Unlike seconds it is the same on every machine. What has been spent stands in the report as
    ``image_macs``."""


class LatencySection(Section):
    """How candidates' latency is known."""

    mode: Literal["auto", "measure"] = "auto"
    """auto = predicted by a model of this network on this device where that proves good enough, measured otherwise;
    measure = every candidate is measured. What is fine-tuned is measured in any case."""
    measurements: Annotated[int, Field(ge=6, le=100_000)] = 15
    """Measurements the model may ask for; those of candidates count too."""
    max_error: Annotated[float, Field(gt=0, le=1000)] = 0.08
    """Largest median error (fraction) of plans left out, for the model to be trusted."""
    min_spearman: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Smallest rank correlation of plans left out, for the model to be trusted."""


class SearchSection(Section):
    """The search: method, its options, its limits, and how candidates are evaluated."""

    later = frozenset({"forward", "channel_multiple", "scope"})
    method: str = "ccep"
    """A search method (``secateur list methods``), or a file of one's own, ``FILE.py:NAME``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options (``secateur explain METHOD``)."""
    target: TargetSection = TargetSection()
    budget: BudgetSection = BudgetSection()
    latency: LatencySection = LatencySection()
    min_keep_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Smallest fraction of its channels that every group keeps."""
    frozen: tuple[str, ...] = ()
    """Channel groups that are left alone; ``*`` and ``?`` match as in file names."""
    channel_multiple: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Widths are multiples of it; None = the device's (``device.channel_multiple``, its probe or profile), the steps of
    its latency. A target of MACs may be met with finer ones; what that costs on the device is timed, and reported."""
    scope: Literal["inner", "all", "auto"] = "auto"
    """Which groups may be cut: inner = those whose channels no residual sum carries and no detector's head reads; all =
    the residual stream too; auto = what does less harm to the loss per cost saved, by one uniform cut of each. Where
    inner groups alone cannot reach the target, the stream is cut as well, and the run says so."""
    images: Annotated[int, Field(gt=0, le=10**9)] = 1000
    """Images of the search split each candidate is scored on."""
    recalibrate_images: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """Training images on which a candidate's batch-norm statistics are taken anew; 0 = they stay as they were before
    the cut; null = 512, and none where the method's ``paper_compat`` is set. Candidates see at most a quarter as many
    of them as of search images, those that may be fine-tuned all; a network that was trained as it is keeps its own."""
    memory_mb: Annotated[int, Field(gt=0, le=10**8)] = 1024
    """Bound on the activations of one batch."""
    seconds_per_candidate: Annotated[float, Field(gt=0, le=1e9)] = 120.0
    """A candidate that takes longer is recorded as failed."""
    forward: Literal["auto", "deterministic"] = "auto"
    """auto = the fastest forward pass, found by trials; deterministic = one that gives the same numbers to the last bit
    in every process and order, and ends the run with a message where it fails twice for a candidate. With ``workers``
    it is always deterministic. (``steady``, its former word, is read for one release.)"""

    @property
    def num_recalibration_images(self) -> int:
        """``recalibrate_images``, its default resolved."""
        if self.recalibrate_images is not None:
            return self.recalibrate_images
        return 0 if self.options.get("paper_compat") else RECALIBRATION_IMAGES


class WorkersSection(Section):
    """Worker processes that score candidates; how many there are changes no answer, so a run may go on with others."""

    engine: Literal["none", "processes", "dask", "ray"] = "none"
    """none = this process scores all candidates itself; processes = on this machine; dask, ray = on a cluster (or one
    made for this run on this machine), with the extra of that name."""
    count: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Batches under way at once, which is worker processes on this machine; null = as many as the cores this
    process may use, or workers (Dask) or CPUs (Ray) in the cluster."""
    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """Candidates of a batch, at most: what is repeated when a worker dies. Each is a task, which has its price."""
    address: str | None = None
    """Of an existing cluster: Dask's scheduler (``tcp://host:8786``) or Ray's (``host:6379``, ``ray://...``, ``auto``);
    null = make one on this machine."""

    @model_validator(mode="after")
    def _complete(self) -> WorkersSection:
        if self.address is not None and self.engine not in ("dask", "ray"):
            raise ValueError(f"engine {self.engine!r} has no address; set engine: dask or ray")
        return self


class RewardSection(Section):
    """Which reward ranks candidates; ``options`` are the preset's parameters."""

    preset: str = "device"
    """Name of a reward."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its parameters."""


class FinetuneSection(Recipe):
    """The fine-tuning of the best plans."""

    later = Recipe.later | {"quantise"}
    top: Annotated[int, Field(ge=1, le=10_000)] = 2
    """How many plans of the archive are fine-tuned; the best by reward becomes the compact model."""
    distill: Distillation | None = Distillation()
    """Learning from the unpruned network beside the labels; None = from the labels alone."""
    from_scratch: bool = False
    """Train the chosen plans from random weights instead of the search's: the control for every method."""
    quantise: Literal["auto", "int8", "off"] = "auto"
    """Whether a second, short training follows in which layers compute with the steps of the int8 file, where int8 may
    ship: a quarter of the epochs at a tenth of the learning rate. int8 = always; auto = where int8 costs the trained
    network more than half of gate.max_drop; off = never. The better network is kept."""


class ExportSection(Section):
    """The ONNX export and its proof."""

    later = frozenset({"input_name", "output_name"})

    opset: Annotated[int, Field(ge=18, le=25)] = 20
    """Version of ONNX's operators."""
    tolerance: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Largest relative difference between the ONNX file and the PyTorch model."""
    dynamic_batch: bool = False
    """Whether the files take any number of images at once, instead of one."""
    parity_images: Annotated[int, Field(gt=0, le=10**9)] = 64
    """Images of the search split on which the ONNX file and the PyTorch model are compared."""
    input_name: PortName = "input"
    """What the files call their input."""
    output_name: PortName = "logits"
    """What the files call their output; that of a file with postprocessing is named by what it holds."""


class GateSection(Section):
    """What a compact model must show before it may become ``champion``; None switches a check off.

    The first ones are asked of the run's own measurements, the others when the model is to take a champion's place.
    """

    later = frozenset({"promote", "min_accuracy", "max_p95_ms", "max_peak_rss_bytes", "max_drop_champion"}) | {
        *("max_latency_increase", "max_resource_increase", "require_stable", "sure")
    }
    max_drop: Annotated[float, Field(ge=0, le=1)] | None = 0.02
    """Largest loss of accuracy on the test split, as a fraction (0.02 = two percentage points)."""
    min_speedup: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """The lower end of the speed-up's 95 % interval must lie above this."""
    max_macs_ratio: Fraction | None = None
    """Largest ratio of the compact model's MACs to the unpruned network's."""
    budgets: bool = True
    """Whether the device profile's budgets (p50_ms, p95_ms, size_bytes, peak_rss_bytes) must be met."""
    promote: bool = True
    """Whether the run itself promotes a model that passes; false = it stays a challenger for `secateur promote`."""
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    """Smallest accuracy on the test split."""
    max_p95_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Longest 95th percentile of the compact model's latency, in milliseconds."""
    max_peak_rss_bytes: Annotated[int, Field(gt=0, le=2**50)] | None = None
    """Largest peak of the measuring process's memory (RSS), in bytes."""
    max_drop_champion: Annotated[float, Field(ge=0, le=1)] | None = 0.01
    """Largest loss of accuracy against the reigning champion, on the same test images."""
    max_latency_increase: Annotated[float, Field(ge=0, le=1e6)] | None = 0.05
    """Largest increase of p50 and p95 over the champion's (0.05 = five per cent); what counts is the upper end of the
    95 % interval of their ratio, measured in one interleaved run of as many processes as it takes to tell."""
    max_resource_increase: Annotated[float, Field(ge=0, le=1e6)] | None = 0.10
    """The same for the first call, peak RSS and the file's size."""
    require_stable: bool = True
    """Whether a timing in which disturbed processes count keeps a model from becoming champion."""
    sure: bool = False
    """Whether accuracy and its drop are judged by the far end of their 95 % interval over images, instead of exactly on
    these test images."""


class ReportSection(Section):
    """What the report shows; changes no result, so it may be another when a run is resumed."""

    control: Literal["none", "uniform"] = "uniform"
    """uniform = a plan that keeps one share of every group, at the MACs of the chosen one, stands in the trade-off: it
    is scored, not trained. none = no such plan."""
    pictures: bool = True
    """Whether images of the data are in the report; false = none are, anywhere."""
    sensitivity: bool = False
    """Whether every group is cut alone to three widths, and the accuracy lost is shown: three evaluations a group after
    the search. False = the report shows those cuts that the search itself made."""


Licence = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f|`]+$", max_length=100)]
Sentences = Annotated[str, Field(min_length=1, max_length=2000)]


class LicenceSection(Section):
    """Under which licences a model is: identifiers as model hubs know them (``mit``, ``apache-2.0``, ``cc-by-4.0``), or
    names."""

    model: Licence = "unknown"
    """Of the network's code."""
    weights: Licence = "unknown"
    """Of the trained weights that the run begins with, or of what a baseline of one's own may be used for."""
    data: Licence = "unknown"
    """Of the images and their labels."""


class CardSection(Section):
    """What the model card says that no measurement tells; it changes no result."""

    licence: LicenceSection = LicenceSection()
    intended_use: Sentences | None = None
    """What the model is for, in sentences; None = the card says what it was made and measured for."""
    limits: Sentences | None = None
    """What it must not be used for, or where it is known to fail; the card's own limits stand beside it."""


class TrackingSection(Section):
    """MLflow: where candidates go and where the final model is registered."""

    uri: str | None = None
    """MLflow's tracking server; None = ``SECATEUR_TRACKING_URI``, or SQLite and a folder under SECATEUR_HOME. A
    password in it is refused: set ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``, or
    ``SECATEUR_TRACKING_URI``."""
    experiment: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=200)] = "secateur"
    """MLflow's experiment that holds the run and its candidates; made if missing."""
    registered_model: Annotated[str, Field(pattern=r"^[^/:.%\"'\\`\x00-\x1f\x7f-\x9f]+$", max_length=200)] | None = None
    """Name in the registry; None = the run's name."""
    take_over: bool = False
    """Whether an experiment, a registered model or an alias that Secateur did not make may become its own."""
    required: bool = False
    """Whether an unreachable server stops the run at its start."""

    @field_validator("experiment", "registered_model", "uri")
    @classmethod
    def _not_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is blank; write a name, or leave it out for the default")
        return text

    @field_validator("uri")
    @classmethod
    def _without_a_password(cls, uri: str | None) -> str | None:
        if uri is not None and has_password(uri):
            raise ValueError(
                "holds a password or a token, which would be copied into the run directory; leave it out here and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment "
                "(for a database, leave out tracking.uri and set SECATEUR_TRACKING_URI)"
            )
        return uri


def _one_is_a_list_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _each_once(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or len(set(value)) < len(value):
        raise ValueError("names no precision, or one twice; write for example precision: [fp32, int8]")
    return value


Ships = Annotated[tuple[str, ...], BeforeValidator(_one_is_a_list_of_one), AfterValidator(_each_once)]


class PrecisionSection(Section):
    """What may ship, and whether the layers of one network may differ."""

    ship: Ships
    """As the list that may stand in place of this section."""
    layers: bool = False
    """Whether layers of an int8 network may stay in fp32: the first ones, and those that are most sensitive, which a
    look at each layer alone finds. Each of these few mixtures is tried for every candidate, and counts as an
    evaluation."""


class RunFile(Section):
    """Everything one run needs to know."""

    later = frozenset({"precision", "compute_count"})
    passing = frozenset({"workers", "report", "card"})
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
    """Names run directories, and the registered model where ``tracking.registered_model`` is not set."""
    workload: dict[str, Any]
    """The task, by its ``name``: model and data."""
    device: DeviceSection = DeviceSection()
    search: SearchSection = SearchSection()
    reward: RewardSection = RewardSection()
    baseline: Recipe = Recipe()
    finetune: FinetuneSection = FinetuneSection()
    export: ExportSection = ExportSection()
    gate: GateSection = GateSection()
    precision: Ships | PrecisionSection = ("fp32",)
    """What may ship: fp32, int8, fp16 (by which ONNX Runtime gains nothing on a CPU). Of several, the best by reward is
    chosen for every candidate, by accuracy and latency of the very file; each one tried counts as an evaluation. Where
    latency is not asked for, the first is taken. ``{ship: [...], layers: true}`` allows int8 with layers in fp32."""
    report: ReportSection = ReportSection()
    card: CardSection = CardSection()
    tracking: TrackingSection = TrackingSection()
    workers: WorkersSection = WorkersSection()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of search, training and fine-tuning; never of the splits."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads for training and evaluation; None = as many whole cores as this process may use, by its affinity and
    its control groups (a container's limit)."""
    compute: Literal["auto", "cpu", "cuda"] = "auto"
    """Where candidates are trained and evaluated (the device is measured apart)."""
    compute_count: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many train together, each with its part of every batch: GPUs of this machine, or processes with their share
    of the threads. The baseline and fine-tunings; auxiliary trainings and everything else is one's. Batch norm
    normalises each part of a batch by itself, unless the recipe has ``sync_batchnorm``."""
    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _features_agree(self) -> RunFile:
        distill = self.finetune.distill
        if distill is not None and distill.features and self.search.scope != "inner":
            raise ValueError(
                "finetune.distill.features compares outputs of blocks, which have the same shape in both networks only "
                "where the stream between them is left alone; set search.scope: inner, or leave out "
                "finetune.distill.features"
            )
        return self

    @property
    def ships(self) -> tuple[str, ...]:
        """The precisions that may ship."""
        return self.precision.ship if isinstance(self.precision, PrecisionSection) else self.precision

    @property
    def layers_may_differ(self) -> bool:
        """Whether layers of a network may have another precision than the rest."""
        return isinstance(self.precision, PrecisionSection) and self.precision.layers

    @property
    def folder(self) -> Path | None:
        """Where the file lay: modules that it names are looked for there; None = it came from no file."""
        return self._folder

    def lying_in(self, folder: Path | None) -> RunFile:
        """The same run file, of another folder."""
        copy = self.model_copy()
        copy._folder = folder
        return copy

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name this configuration; where it is tracked does not matter to a resumed run."""
        content = {key: value for key, value in digested(self).items() if key != "tracking"}
        with_first_words(content)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digested(section: Section) -> dict[str, Any]:
    """A section as JSON, without what its digest leaves out."""
    written, content = section.model_dump(mode="json"), {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key in section.passing or (key in section.later and value == field.get_default(call_default_factory=True)):
            continue
        name = section.formerly.get(key, key)
        content[name] = digested(value) if isinstance(value, Section) else written[key]
    return content


def has_password(uri: str) -> bool:
    """Whether an address holds a password or a token: before its host, or among its parameters."""
    try:
        parts = urlsplit(uri)
        token = parts.scheme in ("http", "https") and bool(parts.username)
        names = [name for text in (parts.query, parts.fragment) for name, _ in parse_qsl(text)]
        return token or bool(parts.password) or any(map(is_secret, names))
    except ValueError:  # no address; whoever uses it says so
        return False
