"""int8 of pruned networks: how fast a plan's file is made, what it loses, and which widths pay.

    SECATEUR_DATA=... python benchmarks/precision.py [--plans 10] [--images 800] [--only REGEX] [--state PATH]
        [--json PATH]

SECATEUR_DATA holds `imagenet_sample/` (a JPEG a class, the class's number first in its name) with
`weights/imagenet/mobilenet_v2_imagenet.safetensors`, and `cifar10/` (strips of 500 images, labels as `.npy`) with
`weights/cifar10/resnet56_cifar10.safetensors`. MobileNetV2 is calibrated on 200 of the images and scored on 800 others,
ResNet-56 on training images and the test split. Nothing is trained; batch norm is recalibrated on the calibration
images after each cut. Times are CPU times of one thread, of two things in turn in one process. Every figure is printed
when it is found; with `--state` it is kept in that file too, and a benchmark that was ended goes on from there.

`requantise_speedup`: seconds of `quantize_static` over those of cutting and requantising, MobileNetV2, median over
plans; both begin with the float template and the pruned network's weights in memory. `quantize_static` is given four
images there, so that it is not slow by its calibration; cleaning the graph is not in its time.
`requantise_gap_pp`: largest difference of top-1, in percentage points, of the file that is cut and requantised from the
file that is quantised from the beginning with ranges of the pruned network; seeded plans that keep 85 to 100 % of their
channels, only those that keep half of the unpruned network's top-1 in float.
`int8_drop_pp`: top-1 of the unpruned network in float less that in int8; `int8_ratio`: its latency in int8 over that in
float.
`int8_latency_error`: median error, as a fraction, of the latency model in int8 on random plans that it never saw, half
of them of equal MACs; it measures 15 plans of its own. The larger one of MobileNetV2 and ResNet-56, random weights.
`int8_profiles_read`: the share of its measurements in whose profiles every layer was found.
`joint_gain`: latency of plans that were chosen in float and then quantised as a whole, over that of the fastest plan
and precision of layers at no lower top-1, median over plans; the lower one of both networks. `joint_gain_widths`: the
same where widths alone are chosen in int8. Plans are not trained (`benchmarks/_joint.py`).
`best_total_speedup`: latency of the unpruned ResNet-56 in fp32 over that of its committed compact network, in the
fastest precision that loses 1.0 percentage points at most; `best_over_dense_int8`: the same over the unpruned one in
int8. Both need the compact network's `plan.json` and `weights.safetensors` in `results/compact/resnet56`.
`int8_alignment_gain`: latency in int8 of MobileNetV2 with about 73 % of its channels, odd widths over multiples of 16.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._joint import joint
from benchmarks._output import Figure, parser, present
from benchmarks.latency_model import MEASUREMENTS, TRUTH, Network
from secateur.device_profiles import load_profile
from secateur.export import open_session
from secateur.export.batching import Predictor
from secateur.export.folding import clean
from secateur.export.qdq import Calibration, quantise
from secateur.export.quantised import QuantisedTemplate
from secateur.export.quantize import layers_in_float
from secateur.export.sensitivity import sensitivity
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.schema import LatencySection
from secateur.pipeline.evaluation.latency import Latencies, plan_of
from secateur.pipeline.evaluation.precisions import SENSITIVITY_IMAGES
from secateur.pipeline.run.layer_precisions import mixtures
from secateur.pipeline.run.schemes import scheme_of
from secateur.pipeline.training.statistics import recalibrate
from secateur.pipeline.workloads.data.paths import under_data
from secateur.pipeline.workloads.networks.small import CifarResNet
from secateur.pruning import PruningPlan, prune
from secateur.pruning.plan import SearchSpace
from secateur.pruning.saliency import channel_saliency, uniform_plan
from secateur.pruning.trace import trace

Array = npt.NDArray[Any]
SPEEDUP, GAP_PP, DROP_PP, RATIO, GAIN, ERROR = 30.0, 1.0, 1.0, 0.60, 1.5, 0.06
CALIBRATION, FEW = 200, 4
KEPT = 0.73
REPEATS = 30
JOINT, JOINT_WIDTHS, TOTAL, OVER_INT8 = 1.1, 0.98, 3.0, 1.5
COMPACT = Path(__file__).parents[1] / "results" / "compact"
NOT_COMMITTED = "no committed compact network"
HELD_OUT = 24
"""Plans that a latency model is judged by."""


@dataclass(frozen=True)
class Task:
    """A network with its images.

    Args:
        calibration: shape ``(n, channels, height, width)``, as the network takes them.
        batches: gives the images that are scored, with their labels.
    """

    name: str
    model: nn.Module
    calibration: Array
    batches: Callable[[], Iterator[tuple[Array, Array]]]


def mobilenet(images: int) -> Task:
    """MobileNetV2 with its ImageNet weights; its images are upside down, as those weights want them."""
    model = mobilenet_v2()
    weights = load_file(_data("weights/imagenet/mobilenet_v2_imagenet.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    files = sorted(_data("imagenet_sample/images").iterdir())
    order = np.random.default_rng(0).permutation(len(files))
    chosen, scored = order[:CALIBRATION], order[CALIBRATION : CALIBRATION + images]

    @cache
    def decoded() -> Array:
        return np.stack([_photograph(files[i]) for i in scored])

    def batches() -> Iterator[tuple[Array, Array]]:
        labels = np.array([int(files[i].name[:4]) for i in scored])
        for part in np.array_split(np.arange(len(scored)), -(-len(scored) // 128)):
            yield _normalised(decoded()[part]), labels[part]

    calibration = _normalised(np.stack([_photograph(files[i]) for i in chosen]))
    return Task("mobilenet_v2", model.eval(), calibration, batches)


def resnet(images: int) -> Task:
    """ResNet-56 with its CIFAR-10 weights, on the first test images."""
    model = CifarResNet(9)
    model.load_state_dict(load_file(_data("weights/cifar10/resnet56_cifar10.safetensors")))
    labels = np.load(_data("cifar10/test_labels.npy"))

    def batches() -> Iterator[tuple[Array, Array]]:
        for k in range(-(-images // 500)):
            stop = min(500, images - 500 * k)
            yield _strip(f"test_{k:02d}")[:stop], labels[500 * k : 500 * k + stop]

    return Task("resnet56", model.eval(), _strip("train_00")[:CALIBRATION], batches)


def _data(name: str) -> Path:
    return under_data(name)


def _photograph(file: Path) -> Array:
    """Shape (224, 224, 3), uint8."""
    image = Image.open(file).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def _normalised(pixels: Array) -> Array:
    """Shape (n, height, width, 3), uint8 -> (n, 3, height, width), upside down."""
    return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)[:, :, ::-1])


def _strip(name: str) -> Array:
    pixels = np.asarray(Image.open(_data(f"cifar10/{name}.webp")).convert("RGB"), np.float32).reshape(-1, 32, 32, 3)
    normalised = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), np.float32)


class Contest:
    """One network in float and in int8."""

    def __init__(self, task: Task, scheme: str) -> None:
        self.task, self.calibration = task, Calibration(task.calibration, scheme)
        self.few = Calibration(task.calibration[:FEW], scheme)
        example = torch.from_numpy(task.calibration[:1])
        self.graph = trace(task.model, example)
        self.template = OnnxTemplate.export(task.model, example, self.graph)
        self.quantised = QuantisedTemplate.make(self.template, self.calibration)
        self._mixed = {frozenset[str](): self.quantised}
        self.full = PruningPlan.full(self.graph.groups)
        saliency = channel_saliency(task.model, self.graph, "l1", 0)
        self._best = {name: np.argsort(-values).tolist() for name, values in saliency.items()}

    def plan(self, keep: float, multiple: int, *, up: bool = False) -> PruningPlan:
        """Every group keeps about a share of its channels, those with the largest L1 norms.

        Args:
            multiple: of widths; 1 = odd ones.
            up: no width is rounded down.
        """
        found = uniform_plan(self.graph, keep, model=self.task.model)
        kept = {}
        rounded = ceil if up else round
        for name, channels in found.kept.items():
            width = max(1, rounded(len(channels) / multiple)) * multiple
            if multiple == 1:
                width = (len(channels) - 1) // 2 * 2 + 1
            kept[name] = sorted(self._best[name][: min(width, found.sizes[name])])
        return found.replace(kept)

    def pruned(self, plan: PruningPlan) -> dict[str, Tensor]:
        """Weights of the pruned network, batch norm recalibrated."""
        network = prune(self.task.model, self.graph, plan)
        recalibrate(network, torch.from_numpy(self.task.calibration).split(100))
        return network.state_dict()

    def anew(self, plan: PruningPlan, state: dict[str, Tensor]) -> bytes:
        """The file quantised from the beginning."""
        return self._quantise(self._clean(plan, state), self.calibration)

    def _clean(self, plan: PruningPlan, state: dict[str, Tensor]) -> onnx.ModelProto:
        return clean(onnx.load_model_from_string(self.template.slice(plan, state)))[0]

    @staticmethod
    def _quantise(network: onnx.ModelProto, calibration: Calibration) -> bytes:
        data: bytes = quantise(network, calibration).SerializeToString()
        return data

    def top1(self, file: bytes) -> float:
        """In percent."""
        return float(100 * self._right(file).mean())

    def halves(self, file: bytes) -> tuple[float, float]:
        """Top-1 in percent of every other image, and of the rest."""
        right = self._right(file)
        return float(100 * right[::2].mean()), float(100 * right[1::2].mean())

    def _right(self, file: bytes) -> npt.NDArray[np.bool_]:
        """Whether each image is answered rightly, shape ``(images,)``."""
        predictor = Predictor(file)
        return np.concatenate([predictor(images).argmax(1) == labels for images, labels in self.task.batches()])

    def file(self, plan: PruningPlan, state: dict[str, Tensor] | None, floats: Iterable[str] | None) -> bytes:
        """A plan in fp32, or in int8 but for some layers.

        Args:
            state: weights; None = the unpruned network's.
            floats: layers that stay in float, by their modules; None = all.
        """
        if floats is None:
            return self.template.slice(plan, state)
        kept = frozenset(name for layer in floats for name in (layer, f"{layer}.weight"))
        if kept not in self._mixed:
            self._mixed[kept] = QuantisedTemplate.make(self.template, replace(self.calibration, floats=kept))
        return self._mixed[kept].slice(plan, state)

    def sensitivity(self) -> dict[str, float]:
        """Of every layer in int8 alone."""
        return sensitivity(self.quantised, self.task.calibration[:SENSITIVITY_IMAGES])

    def speedup(self, plan: PruningPlan, state: dict[str, Tensor]) -> float:
        network = self._clean(plan, state)
        ours = _seconds(partial(self.quantised.slice, plan, state), 5)
        return _seconds(partial(self._quantise, network, self.few), 1) / ours

    def ratio(self, file: bytes, reference: bytes) -> float:
        """Median CPU time of a call over that of the reference, in turn."""
        sessions = [open_session(file), open_session(reference)]
        feed = {"input": self.task.calibration[:1]}
        times = [[_seconds(partial(s.run, None, feed), 1) for s in sessions] for _ in range(REPEATS)]
        own, other = np.median(times[3:], axis=0)
        return float(own / other)


def _seconds(action: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return float(np.median(times))


class Found:
    """Figures by name, each computed once: printed when it is found, and kept in a file where one is given.

    Args:
        file: None = nothing is kept.
        settings: what figures depend on; those of other settings are not read.
    """

    def __init__(self, file: Path | None, settings: str) -> None:
        self.file, self.settings = file, settings
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
        self._known = {row["name"]: row["value"] for row in map(json.loads, lines) if row["settings"] == settings}

    def __call__(self, name: str, find: Callable[[], Any]) -> Any:
        if name in self._known:
            return self._known[name]
        started = time.perf_counter()
        value = self._known[name] = find()
        sys.stdout.write(f"{name}: {value} ({time.perf_counter() - started:.0f} s)\n")
        sys.stdout.flush()
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as kept:
                kept.write(json.dumps({"settings": self.settings, "name": name, "value": value}) + "\n")
        return value


def measure(task: Task, scheme: str, plans: int, found: Found) -> dict[str, Any]:
    """One row."""
    made = cache(partial(Contest, task, scheme))  # only where a figure is missing

    def of(figure: str, find: Callable[[Contest], Any]) -> Any:
        return found(f"{task.name} {figure}", lambda: find(made()))

    dense = of("top1", lambda c: c.top1(c.template.slice(c.full)))
    in_int8 = of("top1_int8", lambda c: c.top1(c.quantised.slice(c.full)))
    ratio = of("ratio", lambda c: c.ratio(c.quantised.slice(c.full), c.template.slice(c.full)))

    def alignment(contest: Contest) -> float:
        aligned, odd = (contest.quantised.slice(contest.plan(KEPT, multiple)) for multiple in (16, 1))
        return contest.ratio(odd, aligned)

    gain = of("alignment", alignment)
    error, read = found(f"{task.name} latency error, profiles read", partial(latency_error, task.name))
    together = joint(task.name, made, found)
    compact = compact_speedups(task.name, made, found, dense)
    shares = np.random.default_rng(0).uniform(0.85, 1.0, plans).tolist()
    pairs = [of(f"plan {i} gap, speedup", partial(compared, share, dense)) for i, share in enumerate(shares)]
    usable = [pair for pair in pairs if pair is not None]
    return {
        "network": task.name,
        "scheme": scheme,
        "top1": dense,
        "top1_int8": in_int8,
        "drop_pp": dense - in_int8,
        "ratio": ratio,
        "plans": len(usable),
        "gap_pp": max((gap for gap, _ in usable), default=float("nan")),
        "speedup": float(np.median([speedup for _, speedup in usable])) if usable else float("nan"),
        "alignment": gain,
        "latency_error": error,
        "profiles_read": read,
        **together,
        **compact,
    }


def compact_speedups(name: str, made: Callable[[], Contest], found: Found, dense: float) -> dict[str, float | None]:
    """Latencies of the unpruned network in fp32 and in int8 over that of the committed compact one; None = none is.

    Args:
        dense: top-1 of the unpruned network in fp32, percent.
    """
    folder = COMPACT / name
    if not (folder / "plan.json").is_file():
        return {"total_speedup": None, "over_dense_int8": None}
    plan = PruningPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    state = {key: tensor.float() for key, tensor in load_file(folder / "weights.safetensors").items()}

    def fastest() -> list[float | None]:
        contest, fits = made(), []
        wholes = [contest.file(contest.full, None, floats) for floats in (None, ())]
        names = mixtures("int8", found(f"{name} sensitivity", contest.sensitivity))
        for floats in (None, *map(layers_in_float, names)):
            content = contest.file(plan, state, floats)
            if dense - contest.top1(content) <= DROP_PP:
                fits.append([contest.ratio(whole, content) for whole in wholes])
        return list(max(fits)) if fits else [None, None]

    total, over = found(f"{name} compact {plan.digest}: speed-up, over dense int8", fastest)
    return {"total_speedup": total, "over_dense_int8": over}


def latency_error(name: str) -> list[float]:
    """Median error of the latency model in int8 on plans that it never saw, and the share of profiles it could read."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        network = Network(name, "local", Path(folder), "int8")
        settings = LatencySection(measurements=MEASUREMENTS, max_error=9.0, min_spearman=1e-6)
        space = SearchSpace.of(network.graph.groups)
        latencies = Latencies(lambda: network.table, network.time, Path(folder, "raw.jsonl"), settings, space)
        model, measured = latencies.model(), network.count
        widths = np.concatenate([network.random(HELD_OUT // 2, rng), network.equal(HELD_OUT // 2, rng)])
        truth = [network.time(plan_of(network.full, row), TRUTH)[0]["latency_ratio"] for row in widths]
        network.target.close()
    error = float("inf") if model is None else float(np.median(np.abs(model.ratios(widths) / np.array(truth) - 1)))
    return [error, len(latencies.samples) / measured]


def compared(share: float, dense: float, contest: Contest) -> list[float] | None:
    """Difference of top-1 and speed-up of requantising for one plan; None where the cut costs half of the top-1."""
    plan = contest.plan(share, 8)
    state = contest.pruned(plan)
    if contest.top1(contest.template.slice(plan, state)) < dense / 2:
        return None
    files = contest.quantised.slice(plan, state), contest.anew(plan, state)
    return [abs(contest.top1(files[0]) - contest.top1(files[1])), contest.speedup(plan, state)]


def figures_of(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    gap, drop, ratio, error = (max(row[key] for row in rows) for key in ("gap_pp", "drop_pp", "ratio", "latency_error"))
    read = min(row["profiles_read"] for row in rows)
    figures = [
        Figure("requantise_gap_pp", gap, GAP_PP, gap <= GAP_PP),
        Figure("int8_drop_pp", drop, DROP_PP, drop <= DROP_PP),
        Figure("int8_ratio", ratio, RATIO, ratio <= RATIO),
        Figure("int8_latency_error", error, ERROR, error <= ERROR),
        Figure("int8_profiles_read", read, 1.0, read == 1.0),
    ]
    for key, bound in (("joint_gain", JOINT), ("joint_gain_widths", JOINT_WIDTHS)):
        value = min(row[key] for row in rows)
        figures.append(Figure(key, value, bound, value >= bound))
    for row in rows:
        if row["network"] == "resnet56":
            for name, bound in (("total_speedup", TOTAL), ("over_dense_int8", OVER_INT8)):
                figures.append(of_compact(f"best_{name}", row[name], bound))
        if row["network"] == "mobilenet_v2":
            figures.append(Figure("requantise_speedup", row["speedup"], SPEEDUP, row["speedup"] >= SPEEDUP))
            figures.append(Figure("int8_alignment_gain", row["alignment"], GAIN, row["alignment"] >= GAIN))
    return figures


def of_compact(name: str, value: float | None, bound: float) -> Figure:
    """A figure of the committed compact network, where there is one that is accurate enough."""
    if value is None:
        committed = (COMPACT / "resnet56" / "plan.json").is_file()
        return Figure.missing(name, bound, f"it loses more than {DROP_PP:g} pp" if committed else NOT_COMMITTED)
    return Figure(name, value, bound, value >= bound)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plans", type=int, default=10, help="seeded plans per network (default 10)")
    arguments.add_argument("--images", type=int, default=800, help="images scored (default 800)")
    arguments.add_argument("--state", type=Path, metavar="PATH", help="keep figures here, and go on from those in it")
    arguments.add_argument("--only", default="", metavar="REGEX", help="networks to run")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    scheme, tasks = scheme_of([load_profile("local")]), {"mobilenet_v2": mobilenet, "resnet56": resnet}
    chosen = [make for name, make in tasks.items() if re.search(options.only, name)]
    found = Found(options.state, f"{scheme}, {options.images} images")
    rows = [measure(make(options.images), scheme, options.plans, found) for make in chosen]
    title = f"int8 under ONNX Runtime, one thread, scheme {scheme}"
    present(title, rows, figures_of(rows), options.json)


if __name__ == "__main__":
    main()
