"""Task families. A workload says what to prune and what "still does its job" means: model, data, loss and metric.

Each family is one module here with ``Options`` (its part of the run file) and ``build(options, reading) -> Workload``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.pipeline.workloads.data.record import DataRecord
from secateur.pipeline.workloads.data.sources import ImageSource

if TYPE_CHECKING:
    import onnx


DIVERGENCE_SCORE = "divergence_score"
"""The metric exp(-KL) of a candidate's outputs from the unpruned network's."""


@dataclass(frozen=True)
class Split:
    """Some images of a source.

    Args:
        source: where they come from.
        indices: shape (n,), which of them.
    """

    source: ImageSource
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, n: int) -> Split:
        """The first ``n`` images (all, if there are fewer)."""
        return Split(self.source, self.indices[:n])


@dataclass(frozen=True)
class Agreement:
    """How alike two computations of the same results are.

    Args:
        ok: within the tolerance.
        largest_error: of what was compared; its unit is the postprocessing's own.
        compared: results that both have.
        differing: results that only one has.
        reason: what is wrong; empty when ok.
    """

    ok: bool
    largest_error: float
    compared: int
    differing: int
    reason: str = ""


@dataclass(frozen=True)
class ClassCount:
    """How often a class stands in each split.

    Args:
        name: as in the data; the index where the data has no names.
        train, search, test: images of it, or boxes, as ``DataSummary.counted`` says.
    """

    name: str
    train: int
    search: int
    test: int


@dataclass(frozen=True)
class DataSummary:
    """What a user should see of the data before anything is trained.

    Args:
        classes: in the order of their indices.
        counted: what the counts of the classes count.
        sizes: (width, height) of the images as they are stored, in pixels -> how many have it.
    """

    classes: tuple[ClassCount, ...]
    counted: Literal["images", "boxes"]
    sizes: Mapping[tuple[int, int], int]


class Postprocessing(Protocol):
    """What lies between a network's outputs and what a user wants of it: a detector's decoding and suppression.

    Networks are searched, cut and timed without it; a second ONNX file has it, and is what is registered.
    """

    name: str
    """What results are called (``detections``); also the name of the file's output and part of the file's name."""

    def append(self, network: onnx.ModelProto) -> onnx.ModelProto:
        """The same, as the last part of the network's graph."""

    def apply(self, outputs: Tensor) -> Tensor:
        """Results of raw outputs, one row of shape (n, ...) for every image."""

    def compare(self, found: Tensor, expected: Tensor) -> Agreement:
        """Whether results agree, as sets where their order means nothing."""

    def count(self, results: Tensor) -> Tensor:
        """How much was found in every image, shape (n,): the work that postprocessing has depends on it."""

    def draw(self, images: Tensor, results: Tensor, targets: Tensor | None = None) -> Tensor:
        """Pictures of results on images (normalised, as ``Workload.batch`` gives them), uint8 of shape (n, 3, H, W).

        Args:
            targets: what is to be found; drawn thinly, where given.
        """


class Workload(Protocol):
    """What every stage needs to know of a task.

    ``search`` is carved out of the training data; ``test`` is read once, at the end of a run.
    """

    metric: str
    """The metric the gate looks at (``top1``, ``map50``); a fraction, higher = better."""
    search_metric: str
    """The metric the search goes by: the same, or one that is quicker to have and ranks networks much alike. A workload
    may have ``others``, the further metrics that are shown: name -> (unit, whether "higher" or "lower" is better)."""
    search_metric_is_open: bool
    """Whether the run may choose another one, because the weights know the search images by heart."""
    fingerprint: str
    """Names the content of data and model options; part of every content hash."""
    notes: tuple[str, ...]
    """What a user should know of the data: what was skipped, and how often."""
    record: DataRecord
    """Which images are in which split, and what the fingerprint is made of."""
    train: Split
    """What training sees."""
    search: Split
    """What candidates are evaluated on."""
    test: Split
    """What the last figures are of."""
    postprocessing: Postprocessing | None
    """None where outputs are what a user wants."""
    num_classes: int | None
    """Classes, where every image is of one, so that images can be mixed; None = that is not so."""

    @property
    def reads_anew(self) -> bool:
        """Whether what ``read`` gives follows from the seeds, so that an image is another one in every epoch."""

    @property
    def usage(self) -> Mapping[str, Any]:
        """What a user of an exported file must know to prepare images and read outputs; made of JSON's types.

        ``image_size``, and ``mean`` and ``std`` per channel of pixels in 0..1; ``resize``: ``crop`` (short side scaled,
        centre cropped) or ``stretch``; ``classes`` where they have names.
        """

    @property
    def search_augmented(self) -> bool:
        """Whether ``search_metric`` is taken on augmented search images."""

    def going_by(self, metric: str) -> Self:
        """The same workload with another metric of the search."""

    def summary(self) -> DataSummary:
        """Classes with their counts, and the sizes of the images."""

    def build_model(self) -> nn.Module:
        """The unpruned network, with pretrained weights where the run file names some."""

    def fresh_model(self) -> nn.Module:
        """The unpruned network with random weights, drawn from torch's global generator."""

    @property
    def pretrained(self) -> bool:
        """Whether ``build_model`` loads trained weights, so that no baseline training is needed."""

    def example_input(self) -> Tensor:
        """Shape (1, channels, height, width), float32."""

    def batch(
        self, split: Split, indices: Tensor, *, train: bool, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Normalised images (channels-last, augmented if ``train``) and targets; ``indices`` count within the split.

        That is ``prepare`` after ``read``, with seeds that the generator draws.
        """

    def read(self, split: Split, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and targets in the CPU's memory, not prepared; the same in every process.

        Args:
            seeds: shape (n,), what the augmentation of each image follows from (``data.seeds``); None = they are not
                augmented.
        """

    def prepare(
        self, images: Tensor, targets: Tensor, seeds: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What was read, for the network: on the device, normalised, channels-last, the rest of the augmentation done.

        Args:
            images, targets: in the CPU's memory, or on the device already.
            seeds: as for ``read``.
        """

    def augmented(
        self, split: Split, indices: Tensor, *, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """A batch of images as the search sees them where they may be known by heart: altered without being harder."""

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """What training lowers: a scalar, the mean over the batch."""

    def distillation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """What fine-tuning adds to the loss for a teacher: how far its softened outputs are from the student's."""

    def answers(self, outputs: Tensor, targets: Tensor, *, brief: bool = False) -> Tensor:
        """What metrics need of a batch's outputs, shape (n, ...).

        Args:
            brief: only what ``loss`` and ``search_metric`` need; only ``loss``, where the latter is ``metric``.
        """

    def metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Metrics of all answers of a split at once (``top1``, ``loss``)."""

    def test_metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        """The same for the end of a run, where more may be worth its time."""

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """How far outputs are from the unpruned network's for the same images, shape (n,), nats, >= 0.

        Only asked for where ``search_metric`` is ``DIVERGENCE_SCORE``.
        """

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How easy each image is, shape (n,): those that are likely to go wrong first come first."""

    def bound(self, answers: Tensor, targets: Tensor, num_unseen: int) -> float:
        """The largest value ``search_metric`` can still take when ``num_unseen`` images follow these."""


@runtime_checkable
class TellsImages(Protocol):
    """A workload that says of every image what a network makes of it; what reports show of single images needs it."""

    def per_image(self, answers: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """What is known of the images, by name."""

    def resampled(self, told: Mapping[str, Tensor], weights: Tensor) -> Tensor | None:
        """The metric of bootstrap samples of the images, shape (draws,); None = it does not follow from ``told``.

        Args:
            told: of ``per_image``.
            weights: how often each image is in a sample, shape (draws, images).
        """


def own_calibration_images(workload: Workload) -> Tensor | None:
    """Those that a task of one's own names, shape (n, ...); None = it names none."""
    own: Tensor | None = getattr(workload, "calibration", lambda: None)()
    return own


def calibration_images(workload: Workload, num_images: int) -> Tensor:
    """Inputs that integer precisions take their ranges from, shape (n, ...): those that a task of one's own names, else
    the first training images, as they are."""
    own = own_calibration_images(workload)
    if own is not None:
        return own
    few = workload.train.first(num_images)
    every = torch.arange(len(few))
    return workload.batch(few, every, train=False, generator=None, device=torch.device("cpu"))[0]
