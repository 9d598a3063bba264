"""A task of one's own: a class in one file says what is pruned, on which data, and what it is judged by.

``task`` names the class, ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``; it needs nothing of Secateur. Five methods are
required (``task.Task``), all else has a default (``task.Optional``). A network takes one tensor of shape
(n, channels, height, width), float32, and gives one tensor of shape (n, ...); several outputs are concatenated by the
network, and taken apart in ``loss`` and ``answers``.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from secateur.device_profiles.shelf import in_file
from secateur.pipeline.config.schema import Section
from secateur.pipeline.config.trust import CODE, consented_code
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import DataSummary, Postprocessing, Split
from secateur.pipeline.workloads.classification.losses import distillation_loss
from secateur.pipeline.workloads.custom.calls import kind
from secateur.pipeline.workloads.custom.items import Items, carve
from secateur.pipeline.workloads.custom.metrics import Measure
from secateur.pipeline.workloads.custom.task import OwnCode, code_digest, make_task
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.record import DataRecord, digest_of, fingerprint_of, members_of, parts_of
from secateur.pipeline.workloads.data.seeds import draw, seeded

SEARCH_FRACTION = 0.1
"""Share of the training items that is held out for the search, where the run file says none."""
LOOKED_AT = 8
"""Training items that a task is tried on when it is opened."""
CPU = torch.device("cpu")


class Options(Section):
    """The ``workload`` section for a task of one's own."""

    name: Literal["custom"] = "custom"
    task: str
    """The class, ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``; files and modules are looked for beside the run file, and
    modules in the environment too."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The arguments that the class is made with."""
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = SEARCH_FRACTION
    """About which share of the training items is held out for the search, drawn by content, whole groups at a time."""

    @field_validator("task")
    @classmethod
    def _of_code(cls, text: str) -> str:
        if in_file(text) is None and CODE.fullmatch(text) is None:
            raise ValueError(
                "is neither FILE.py:NAME nor PACKAGE.MODULE:NAME; write a file beside the run file and a class in it: "
                "task.py:Task"
            )
        return text


def build(options: Options, reading: Reading = Reading()) -> Custom:  # noqa: B008 - frozen
    """Open the data, carve the search split and try the task on a few items.

    Raises:
        UserError: the task fails, or what it returns is not what is asked for.
    """
    made_of, file = consented_code(options.task, "workload.task")
    task = make_task(options.task, made_of, options.options)
    return Custom(options, OwnCode(options.task, task), code_digest(file), reading)


@dataclass(frozen=True)
class Look:
    """What a few items show of a task.

    Args:
        answers: shape of an item's answers.
        dtype: of answers.
        metrics: in their order.
        class_scores: whether outputs are scores of classes, along their second dimension.
        state: the network's weights.
    """

    answers: tuple[int, ...]
    dtype: torch.dtype
    metrics: Mapping[str, Measure]
    class_scores: bool
    state: Mapping[str, Tensor]


class Custom:
    """A task of one's own as a workload.

    Args:
        code: the task's, with the task made of the options.
        text: names the text of the code.
    """

    search_metric_is_open = search_augmented = False
    num_classes: int | None = None

    def __init__(self, options: Options, code: OwnCode, text: str, reading: Reading = Reading()) -> None:  # noqa: B008
        self.options, self.code = options, code
        self.pretrained = bool(getattr(code.task, "pretrained", False))
        self.postprocessing: Postprocessing | None = getattr(code.task, "postprocessing", None)
        named = str(code.ask("fingerprint")) if code.has("fingerprint") else None
        with reading.progress.stage("Read the task's data"):
            train, test = Items(code, "train", named), Items(code, "test", named)
        self.train, self.search, self.test, self.notes = carve(train, test, options.search_fraction)
        self.sizes = dict(train.sizes + test.sizes)
        self.look = self._look()
        self.metric = self.search_metric = next(iter(self.look.metrics))
        parts = {"train": self.train, "search": self.search, "test": self.test}
        members = tuple(
            member
            for name, split in parts.items()
            for member in members_of({name: split.indices}, split.source.places, split.source.contents)
        )
        content: dict[str, Any] = {"options": options.model_dump(mode="json"), "the task's code": text}
        content |= {"data": digest_of(members), "weights": _digest(self.look.state) if self.pretrained else None}
        self.fingerprint = fingerprint_of(content)
        self.record = DataRecord(self.fingerprint, parts_of(content), members, files=False)

    def _look(self) -> Look:
        """Try the task on a few training items.

        Raises:
            UserError: it fails, or returns what nobody can use.
        """
        code, few = self.code, self.train.first(LOOKED_AT)
        with seeded(0), torch.inference_mode():
            model = self.build_model()
            inputs, targets = self.batch(few, torch.arange(len(few)), train=False, generator=None, device=CPU)
            outputs = code.outputs(model, inputs)
            code.loss(outputs, targets)
            answers = code.answers(outputs, targets)
            measures = code.measures(answers, targets)
        state = model.state_dict()
        return Look(tuple(answers.shape[1:]), answers.dtype, measures, are_class_scores(outputs, targets), state)

    @property
    def usage(self) -> Mapping[str, Any]:
        given = getattr(self.code.task, "usage", None) or {}
        return dict(self.code.ask("usage") if callable(given) else given)

    def going_by(self, metric: str) -> Self:
        other = copy.copy(self)
        other.search_metric = metric
        return other

    @property
    def others(self) -> Mapping[str, tuple[str, str]]:
        """The metrics that are shown besides the gate's: name -> (unit, which of "higher" and "lower" is better)."""
        return {name: (m.unit, m.better) for name, m in self.look.metrics.items() if name != self.metric}

    def summary(self) -> DataSummary:
        return DataSummary((), "images", self.sizes)

    # -- the network and its inputs ------------------------------------------------------------------------------------

    def fresh_model(self) -> nn.Module:
        return self.code.model(False)

    def build_model(self) -> nn.Module:
        return self.code.model(True)

    def example_input(self) -> Tensor:
        if not self.code.has("example"):
            return self.batch(self.train, torch.tensor([0]), train=False, generator=None, device=CPU)[0]
        example = self._inputs("example")
        if len(example) != 1:
            raise UserError(f"{self.code.of('example')} returned {len(example)} inputs; return one")
        return example

    def calibration(self) -> Tensor | None:
        """Inputs that integer precisions take their ranges from, shape (n, channels, height, width); None = any.

        Raises:
            UserError: the task's code fails, or returns something else.
        """
        return self._inputs("calibration") if self.code.has("calibration") else None

    def _inputs(self, method: str) -> Tensor:
        """What a method of the task returns, which shall be inputs of the network."""
        inputs = self.code.ask(method)
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not len(inputs):
            raise UserError(
                f"{self.code.of(method)} returned {kind(inputs)}; return a tensor (n, channels, height, width)"
            )
        return inputs.float()

    def batch(
        self, split: Split, indices: Tensor, *, train: bool, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        seeds = draw(len(indices), generator) if train else None
        return self.prepare(*self.read(split, indices, seeds), seeds, device)

    @property
    def reads_anew(self) -> bool:
        return self.code.has("augment")

    def read(self, split: Split, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        drawn = seeds.tolist() if seeds is not None and self.reads_anew else None
        return self.code.collated(cast(Items, split.source).items(split.indices[indices.numpy()].tolist(), drawn))

    def prepare(
        self, images: Tensor, targets: Tensor, seeds: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        del seeds
        images, targets = (tensor.to(device, non_blocking=True) for tensor in (images, targets))
        return images.contiguous(memory_format=torch.channels_last), targets

    def augmented(
        self, split: Split, indices: Tensor, *, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """As in training."""
        return self.batch(split, indices, train=True, generator=generator, device=device)

    # -- loss and metrics ----------------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        if label_smoothing:
            raise UserError(f"label_smoothing: {self.code.of('loss')} has none; set it to 0 in the recipe")
        return self.code.loss(outputs, targets)

    def distillation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        if self.code.has("distill"):
            learned: Tensor = self.code.ask("distill", student, teacher, temperature)
            return learned
        if self.look.class_scores:
            learner, taught = (outputs.movedim(1, -1).flatten(0, -2) for outputs in (student, teacher))
            return distillation_loss(learner, taught, temperature)
        return F.mse_loss(student.float(), teacher.float())

    def answers(self, outputs: Tensor, targets: Tensor, *, brief: bool = False) -> Tensor:
        """Shape (n, 1 + numbers): the batch's mean loss, then each item's answers in a row.

        Raises:
            UserError: the task's code fails, or its answers have another shape than before.
        """
        del brief
        loss, own = self.code.loss(outputs, targets).detach(), self.code.answers(outputs, targets)
        if own.shape[1:] != self.look.answers:
            raise UserError(
                f"{self.code.of('answers')} gave an item {tuple(own.shape[1:])} numbers, before {self.look.answers}; "
                "answers of all items must have one shape: pad what differs"
            )
        exact = torch.float32 if own.is_floating_point() and own.element_size() <= 4 else torch.float64
        return torch.cat([loss.to(exact).expand(len(own), 1), own.reshape(len(own), -1).to(exact)], 1)

    def metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        """The task's metrics, and the mean ``loss``; a metric of the gate that is NaN counts as 0, the worst.

        Raises:
            UserError: the task's code fails, or it returns other names than before.
        """
        own = answers[:, 1:].reshape(len(answers), *self.look.answers).to(self.look.dtype)
        found = {name: measure.value for name, measure in self.code.measures(own, targets).items()}
        if list(found) != list(self.look.metrics):
            raise UserError(
                f"{self.code.of('metrics')} returned {', '.join(found)}, and {', '.join(self.look.metrics)} before; "
                "return the same names in the same order for all answers"
            )
        if math.isnan(found[self.metric]):
            found[self.metric] = 0.0
        return {**found, "loss": answers[:, 0].mean().item()}

    test_metrics = metrics

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Never asked for: the search goes by the task's own metric."""
        raise NotImplementedError

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Nothing is known of single items: they are gone through as they come."""
        del targets
        return torch.zeros(len(outputs), device=outputs.device)

    def bound(self, answers: Tensor, targets: Tensor, num_unseen: int) -> float:
        """1: nothing is known of how items to come change the metric."""
        del answers, targets, num_unseen
        return 1.0


def are_class_scores(outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs (n, classes, ...) are scores of the classes whose indices targets (n, ...) are."""
    indices = not targets.is_floating_point() and targets.dtype != torch.bool
    return indices and outputs.ndim > 1 and outputs.shape[1] > 1 and outputs[:, 0].shape == targets.shape


def _digest(state: Mapping[str, Tensor]) -> str:
    """Names weights."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
