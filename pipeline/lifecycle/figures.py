"""Figures of compact models that anybody can compute again: accuracy on the test split, MACs, parameters.

They are those of the files that are kept (weights in fp16, what has one dimension in fp32), computed in fp32 with
PyTorch on the CPU. Another processor adds in another order, so answers differ in their last digits: where an image's
two best answers are nearer to each other than that, either may win. ``Answers.open_images`` says which images these
are, by the tolerance that exported files have (``export.verify.TOLERANCE``).
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.device_profiles.wording import printable
from secateur.export.verify import TOLERANCE
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from secateur.pipeline.lifecycle.per_image import accuracy_of
from secateur.pipeline.run.opening import open_workload, trace_network
from secateur.pipeline.workloads import Workload
from secateur.pipeline.workloads.data.content import Reading
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PlanError, PruningPlan
from secateur.pruning.surgery import prune

BASE, COMPACT, LAST = "base", "compact", "last"
"""The unpruned network; the compact one; where the weights of its best epoch were kept, those of its last one."""
IMAGES_AT_ONCE = 250
MOST_BYTES = 64 << 20
"""Of a file of weights that is read."""
NOISY_DRAWS = 3
"""Draws of rounding errors behind the tolerance of such a metric."""
Bools = npt.NDArray[np.bool_]


class Figures(BaseModel):
    """What the files of a unit show on the test split.

    ``drop_pp`` is in percentage points, with its 95 % interval over test images, paired. ``right`` holds one bit for
    every test image and network, where the metric is the share of right answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    metric: str
    images: int
    accuracy: Mapping[str, float]
    drop_pp: float
    drop_low_pp: float | None
    drop_high_pp: float | None
    original_pixels: Mapping[str, float] = {}
    original_images: int = 0
    macs: Mapping[str, int]
    params: Mapping[str, int]
    right: Mapping[str, str] = {}


@dataclass(frozen=True)
class Task:
    """What a run file names, opened: the unpruned network with the weights that it names, if any, and its channels."""

    workload: Workload
    model: nn.Module
    graph: ChannelGraph

    @classmethod
    def opened(cls, config: RunFile) -> Task:
        """Open what a run file names.

        Raises:
            UserError: data or weights are not here, or do not fit.
        """
        workload = open_workload(config, Reading())
        model = workload.build_model().eval()
        return cls(workload, model, trace_network(model, workload.example_input()))

    def network(self, file: Path, plan: PruningPlan) -> nn.Module:
        """The pruned network with the weights of a file, in fp32.

        Raises:
            UserError: the file is too large or damaged, or does not fit the plan and the network.
        """
        try:
            plan.validate(self.graph)
            network = prune(self.model, self.graph, plan)
            own, state = network.state_dict(), read_weights(file)
            network.load_state_dict({n: t.to(own[n].dtype) if n in own else t for n, t in state.items()})
        except (PlanError, RuntimeError) as error:
            raise UserError(f"{printable(file)} does not fit its plan and network: {error}") from error
        return network.eval()

    @property
    def full(self) -> PruningPlan:
        """The plan that keeps every channel."""
        return PruningPlan.full(self.graph.groups)


@dataclass(frozen=True)
class Answers:
    """What a network answers on the test split.

    Args:
        answers: as the workload gives them, shape (n, ...).
        targets: shape (n, ...).
        noisy: the same answers after rounding errors as large as the tolerance; empty where images tell by themselves.
    """

    answers: Tensor
    targets: Tensor
    noisy: tuple[Tensor, ...] = field(default=())

    @property
    def right(self) -> Bools:
        """Which images are answered rightly, shape (n,)."""
        found: Bools = (self.answers.argmax(1) == self.targets).numpy()
        return found

    @property
    def open_images(self) -> Bools:
        """Images whose two best answers are nearly equal, so that another processor may choose the other, (n,).

        Nearly, measured by how far answers lie apart, of all images: a constant added to an image's changes nothing.
        """
        best, second = self.answers.topk(2, dim=1).values.T
        spread = (self.answers - self.answers.mean(1, keepdim=True)).abs().amax()
        found: Bools = (best - second < 2 * TOLERANCE * spread).numpy()
        return found


def of_images(workload: Workload) -> bool:
    """Whether the metric is the share of images that are answered rightly."""
    return workload.metric == "top1" and workload.num_classes is not None


def answers(workload: Workload, network: nn.Module) -> Answers:
    """What a network answers on the test split: with ``promotion.test_answers`` the only reader of that split."""
    split, found, targets = workload.test, [], []
    noisy: list[list[Tensor]] = [[] for _ in range(0 if of_images(workload) else NOISY_DRAWS)]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for part in torch.split(torch.arange(len(split)), IMAGES_AT_ONCE):
            images, labels = workload.batch(split, part, train=False, generator=None, device=torch.device("cpu"))
            outputs = network(images).float()
            found.append(workload.answers(outputs, labels))
            targets.append(labels)
            for draws in noisy:
                error = TOLERANCE * outputs.abs().max() * (2 * torch.rand(outputs.shape, generator=generator) - 1)
                draws.append(workload.answers(outputs + error, labels))
    return Answers(torch.cat(found), torch.cat(targets), tuple(map(torch.cat, noisy)))


def figures(
    task: Task, plan: PruningPlan, found: Mapping[str, Answers], other_pixels: frozenset[int] = frozenset()
) -> Figures:
    """The figures of networks from their answers.

    Args:
        plan: of the compact network.
        found: of ``base``, ``compact`` and, where there is one, ``last``.
        other_pixels: places of test images that ``original_pixels`` leaves out.
    """
    workload, costs = task.workload, {BASE: cost(task.graph, task.full), COMPACT: cost(task.graph, plan)}
    if of_images(workload):
        right = {name: packed(answered.right) for name, answered in found.items()}
        return of_right_answers(workload.metric, right, len(workload.test), other_pixels, costs)
    metric = {name: _metric(workload, answered.answers, answered.targets) for name, answered in found.items()}
    change = accuracy_of(workload, [found[BASE].answers, found[COMPACT].answers], found[BASE].targets).change
    return Figures(
        metric=workload.metric,
        images=len(workload.test),
        accuracy=metric,
        drop_pp=100 * (metric[BASE] - metric[COMPACT]),
        drop_low_pp=None if change.high is None else -100 * change.high,
        drop_high_pp=None if change.low is None else -100 * change.low,
        macs={name: int(each.macs) for name, each in costs.items()},
        params={name: int(each.params) for name, each in costs.items()},
    )


def of_right_answers(
    metric: str, right: Mapping[str, str], images: int, other_pixels: frozenset[int], costs: Mapping[str, object]
) -> Figures:
    """The figures that follow from which images are answered rightly.

    Args:
        right: as ``packed``, by network.
        costs: with ``macs`` and ``params``, by network.

    Raises:
        UserError: a text is not of so many images.
    """
    bits = {name: unpacked(text, images) for name, text in right.items()}
    differences = bits[BASE].astype(np.float64) - bits[COMPACT]
    drop = float(differences.mean())
    half = 1.96 * float(differences.std(ddof=1)) / math.sqrt(images)
    chosen = np.ones(images, dtype=bool)
    chosen[sorted(other_pixels)] = False
    return Figures(
        metric=metric,
        images=images,
        accuracy={name: float(each.mean()) for name, each in bits.items()},
        drop_pp=100 * drop,
        drop_low_pp=100 * (drop - half),
        drop_high_pp=100 * (drop + half),
        original_pixels={name: float(each[chosen].mean()) for name, each in bits.items()} if other_pixels else {},
        original_images=int(chosen.sum()) if other_pixels else 0,
        macs={name: int(each.macs) for name, each in costs.items()},  # type: ignore[attr-defined]
        params={name: int(each.params) for name, each in costs.items()},  # type: ignore[attr-defined]
        right=right,
    )


def tolerance(workload: Workload, answered: Answers) -> float:
    """How far the metric may lie on another processor, as a fraction: as far as rounding errors have moved it here."""
    if of_images(workload):
        return float(answered.open_images.mean())
    here = _metric(workload, answered.answers, answered.targets)
    return max(abs(_metric(workload, each, answered.targets) - here) for each in answered.noisy)


def _metric(workload: Workload, found: Tensor, targets: Tensor) -> float:
    return float(workload.metrics(found, targets)[workload.metric])


# -- files -------------------------------------------------------------------------------------------------------------


def compact_weights(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Weights as the content of a small safetensors file: fp16, and what has at most one dimension in fp32."""
    small = {
        name: (tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor).cpu().contiguous().clone()
        for name, tensor in state.items()
    }
    made: bytes = save(small, dict(metadata or {}))
    return made


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is missing, too large or damaged.
    """
    return _read(file)[0]


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says besides; raises as ``read_weights``."""
    return _read(file)[1]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{printable(file)} has more than {MOST_BYTES:,} bytes; a compact model has less")
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            return tensors, dict(opened.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read the weights in {printable(file)}: {printable(error)}") from error


def packed(right: Bools) -> str:
    """One bit an image, as text."""
    return base64.b85encode(zlib.compress(np.packbits(right).tobytes(), 9)).decode()


def unpacked(text: str, images: int) -> Bools:
    """The inverse of ``packed``, shape ``(images,)``.

    Raises:
        UserError: it is the text of another number of images, or none.
    """
    length = (images + 7) // 8
    try:
        data = zlib.decompressobj().decompress(base64.b85decode(text), length + 1)
    except (ValueError, zlib.error) as error:
        raise UserError(f"right answers cannot be read: {error}") from error
    if len(data) != length:
        raise UserError(f"right answers are not those of {images} images")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=images).astype(bool)
