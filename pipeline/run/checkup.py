"""A task of one's own, tried on two batches: data, network, loss, metrics, cut, export, training; all faults at once.

What only needs what works goes on where something else fails: metrics are looked at in one go with the network's trace.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from secateur.device_profiles.wording import number_of
from secateur.export.errors import ExportError
from secateur.export.onnx_export import export_onnx
from secateur.export.verify import verify_parity
from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import UserError
from secateur.pipeline.run.opening import trace_network
from secateur.pipeline.training.curve import TrainingError
from secateur.pipeline.training.loop import fit
from secateur.pipeline.workloads import custom
from secateur.pipeline.workloads.custom.items import Items, carve
from secateur.pipeline.workloads.custom.task import OwnCode, Task, make_task
from secateur.pipeline.workloads.data.seeds import seeded
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.surgery import certify, prune

BATCH = 4
"""Items of each of the two batches."""
SAME = 1e-4
"""Relative difference up to which two computations of the same outputs are the same."""
EXPECTED = (UserError, ExportError, TrainingError)


@dataclass(frozen=True)
class Finding:
    """What one part of the check found.

    Args:
        part: what was looked at.
        outcome: ``ok``; ``fault``, which a run would end at; ``skipped``, because it needs a part that has a fault.
        told: what was found, or what is wrong and how to change it, or the part that is needed.
    """

    part: str
    outcome: Literal["ok", "fault", "skipped"]
    told: str


class FewItems:
    """A task whose data are the first items of each split; all else is the task's own."""

    def __init__(self, task: Task, num: int) -> None:
        self._task, self._num = task, num
        if hasattr(task, "groups"):
            self.groups = lambda split: list(task.groups(split))[:num]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def data(self, split: Literal["train", "test"]) -> Any:
        whole = self._task.data(split)
        try:
            return Subset(whole, range(min(self._num, len(whole))))  # type: ignore[arg-type]
        except TypeError:
            return whole  # without a length: told where it is opened


def check_task(name: str, made_of: Any, options: dict[str, Any]) -> list[Finding]:
    """Try a task; every part gives one finding, in order.

    Args:
        name: ``FILE.py:NAME``, for messages.
        made_of: the class.
        options: the arguments it is made with.
    """
    checkup = Checkup(name, options)
    try:
        task = make_task(name, made_of, options)
    except UserError as error:
        return [Finding("methods", "fault", str(error))]
    checkup.findings.append(Finding("methods", "ok", f"{name} has all five"))
    checkup.code = OwnCode(name, cast(Task, FewItems(task, 2 * BATCH)))
    for part, needs, look in (
        ("training data", (), checkup.training_data),
        ("test data", (), checkup.test_data),
        ("splits", ("training data", "test data"), checkup.splits),
        ("augment", ("training data",), checkup.augment),
        ("model", ("training data",), checkup.network),
        ("loss", ("model",), checkup.loss),
        ("answers", ("model",), checkup.answers),
        ("metrics", ("answers",), checkup.metrics),
        ("trace", ("model",), checkup.trace),
        ("cut", ("trace",), checkup.cut),
        ("export", ("cut",), checkup.export),
        ("training", ("splits", "augment", "loss", "metrics"), checkup.training),
        ("resume", ("training",), checkup.resume),
    ):
        checkup.attempt(part, needs, look)
    return checkup.findings


@dataclass
class Checkup:
    """The parts of a check, each of which returns what it found.

    Args:
        name: of the task.
        options: it was made with.
    """

    name: str
    options: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    code: OwnCode = field(init=False)
    train: Items = field(init=False)
    test: Items = field(init=False)
    model: nn.Module = field(init=False)
    outputs: Tensor = field(init=False)
    found: Tensor = field(init=False)
    graph: ChannelGraph = field(init=False)
    plan: PruningPlan = field(init=False)

    def attempt(self, part: str, needs: Sequence[str], look: Callable[[], str]) -> None:
        """Look at a part, unless one that it needs has a fault."""
        lacking = [f.part for f in self.findings if f.part in needs and f.outcome != "ok"]
        if lacking:
            self.findings.append(Finding(part, "skipped", f"needs {' and '.join(lacking)}"))
            return
        try:
            with seeded(0):
                self.findings.append(Finding(part, "ok", look()))
        except EXPECTED as error:
            self.findings.append(Finding(part, "fault", str(error)))

    # -- data ----------------------------------------------------------------------------------------------------------

    def training_data(self) -> str:
        self.train = self._items("train")
        return self._described(self.train)

    def test_data(self) -> str:
        self.test = self._items("test")
        return self._described(self.test)

    def _items(self, split: Literal["train", "test"]) -> Items:
        items = Items(self.code, split, None)
        if len(items) < 2:
            raise UserError(
                f"{self.code.of('data')}({split!r}) has {number_of(len(items), 'item(s)')}; at least two are needed"
            )
        again = Items(self.code, split, None)
        if items.contents != again.contents:
            raise UserError(
                f"{self.code.of('data')}({split!r}) gives other items when it is read again; draw at random in "
                "augment, or from a generator that is seeded by the item's index"
            )
        halves = [self.code.collated(items.items(part)) for part in _halves(len(items))]
        for what, (first, second) in zip(("inputs", "targets"), zip(*halves, strict=True), strict=True):
            if first.shape[1:] != second.shape[1:]:
                raise UserError(
                    f"{what} of two batches of data({split!r}) have shapes {tuple(first.shape)} and "
                    f"{tuple(second.shape)}, which must be the same but for n; pad them in collate, or resize them"
                )
            if first.is_floating_point() and not torch.isfinite(torch.cat([first, second])).all():
                raise UserError(
                    f"{what} of data({split!r}) are NaN or infinite; scale them, and leave out what is missing"
                )
        return items

    def _described(self, items: Items) -> str:
        inputs, targets = self.code.collated(items.items([0]))
        return (
            f"inputs {tuple(inputs.shape[1:])}, targets {tuple(targets.shape[1:])} of {targets.dtype}; "
            f"{number_of(len(items), 'item(s)')} looked at"
        )

    def splits(self) -> str:
        carve(self.train, self.test, 0.25)
        if not self.code.has("groups"):
            return "the search split is drawn by content; give groups(split) where items belong together"
        return f"{number_of(len(set(self.train.groups)), 'group(s)')}, none of them in both"

    def augment(self) -> str:
        if not self.code.has("augment"):
            return "none"
        every = list(range(len(self.train)))
        first, again = (self.code.collated(self.train.items(every, [1 + index for index in every])) for _ in range(2))
        plain = self.batch()
        if first[0].shape != plain[0].shape or first[1].shape != plain[1].shape:
            raise UserError(
                f"{self.code.of('augment')} changes shapes; return an input and a target like those it was given"
            )
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            raise UserError(
                f"{self.code.of('augment')} gives other items for the same seed; draw from random, NumPy's or "
                "PyTorch's global generator"
            )
        return "changes items" if not torch.equal(first[0], plain[0]) else "leaves inputs as they are"

    def batch(self) -> tuple[Tensor, Tensor]:
        """All items looked at: two batches."""
        return self.code.collated(self.train.items(list(range(len(self.train)))))

    # -- the network, its loss and metrics -----------------------------------------------------------------------------

    def network(self) -> str:
        self.model, fresh = self.code.model(True), self.code.model(False)
        shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (self.model, fresh)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{self.code.of('model')} gives other layers with weights than without; give the same network"
            )
        inputs = self.batch()[0]
        with torch.inference_mode():
            self.outputs = self.code.outputs(self.model, inputs)
            alone = torch.cat([self.code.outputs(self.model, one) for one in torch.split(inputs, 1)])
        if not torch.isfinite(self.outputs).all():
            raise UserError(f"{self.code.of('model')}: outputs are NaN or infinite; look at weights and inputs")
        if alone.shape != self.outputs.shape or not _close(alone, self.outputs):
            raise UserError(
                f"{self.code.of('model')}: outputs of an item depend on what else is in the batch; in eval mode they "
                "may not"
            )
        return (
            f"outputs {tuple(self.outputs.shape[1:])}, "
            f"{number_of(sum(p.numel() for p in self.model.parameters()), 'parameter(s)')}"
        )

    def loss(self) -> str:
        model = self.code.model(True).train()
        inputs, targets = self.batch()
        loss = self.code.loss(self.code.outputs(model, inputs), targets)
        if not torch.isfinite(loss):
            raise UserError(
                f"{self.code.of('loss')} is {loss.item()}; it must be finite: bound what it divides by and logs"
            )
        if not loss.requires_grad:
            raise UserError(
                f"{self.code.of('loss')} has no gradient; compute it from outputs, without detach or argmax"
            )
        self.code.attempt("loss(...).backward", loss.backward)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        idle = [name for name, p in named if p.grad is None]
        if len(idle) == len(named):
            raise UserError(f"{self.code.of('loss')} reaches no parameter of the network")
        return f"{loss.item():.4g}" + (
            f"; {number_of(len(idle), 'parameter(s) never learns|learn')}, such as {idle[0]}" if idle else ""
        )

    def answers(self) -> str:
        targets = self.batch()[1]
        self.found = self.code.answers(self.outputs, targets)
        parts = [self.code.answers(self.outputs[h], targets[h]) for h in map(list, _halves(len(targets)))]
        if parts[0].shape[1:] != parts[1].shape[1:] or not torch.equal(
            _numbers(torch.cat(parts)), _numbers(self.found)
        ):
            raise UserError(
                f"{self.code.of('answers')} gives an item other answers in another batch; each row may depend on "
                "its own item alone, and all have one shape"
            )
        size = self.found[0].numel()
        large = (
            f"; {size:,} numbers are kept for every item: count in answers what metrics needs" if size > 10_000 else ""
        )
        return f"{tuple(self.found.shape[1:])} for each item{large}"

    def metrics(self) -> str:
        targets = self.batch()[1]
        measures = self.code.measures(self.found, targets)
        for part in map(list, _halves(len(targets))):
            other = self.code.measures(self.found[part], targets[part])
            if list(other) != list(measures):
                raise UserError(
                    f"{self.code.of('metrics')} gives other names for other items; give the same, in one order"
                )
        first, *others = [f"{name} {m.value:.4g} {m.unit}".strip() for name, m in measures.items()]
        if math.isnan(next(iter(measures.values())).value):
            raise UserError(
                f"{self.code.of('metrics')}: the gate's metric is NaN; say what it is where it is not defined"
            )
        return f"the gate looks at {first}" + (f"; shown besides: {', '.join(others)}" if others else "")

    # -- pruning and export --------------------------------------------------------------------------------------------

    def trace(self) -> str:
        self.graph = trace_network(self.model, self.batch()[0][:1])
        if not self.graph.groups:
            raise UserError("the network has no channels that can be cut:\n" + self.graph.report())
        self.plan = _half(self.graph)
        whole, half = (cost(self.graph, plan).macs for plan in (PruningPlan.full(self.graph.groups), self.plan))
        groups, channels = len(self.graph.groups), sum(group.size for group in self.graph.groups)
        return (
            f"{number_of(groups, 'group(s)')} with {number_of(channels, 'channel(s)')}; half of them cost "
            f"{half / whole:.0%} of the MACs"
        )

    def cut(self) -> str:
        smaller = prune(self.model, self.graph, self.plan)
        certificate = certify(self.model, smaller, self.graph, self.plan, self.batch()[0][:1])
        if not certificate.ok:
            raise UserError(f"the cut network computes something else than the masked one: {certificate.reason}")
        targets = self.batch()[1]
        with torch.inference_mode():
            outputs = self.code.outputs(smaller, self.batch()[0])
            self.code.loss(outputs, targets)
            self.code.answers(outputs, targets)
        return f"equals the masked network (relative difference {certificate.max_relative_error:.1e})"

    def export(self) -> str:
        smaller, inputs = prune(self.model, self.graph, self.plan), self.batch()[0][:2]
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            file = Path(folder) / "cut.onnx"
            export_onnx(smaller, inputs[:1], file)
            parity = verify_parity(file, smaller, torch.split(inputs.contiguous(), 1), tolerance=SAME)
        if not parity.ok:
            raise UserError(f"the ONNX file computes something else than the network: {parity.reason}")
        return f"equals the network (relative difference {parity.max_relative_error:.1e})"

    # -- training ------------------------------------------------------------------------------------------------------

    @cached_property
    def workload(self) -> custom.Custom:
        """The task as a workload, on the items looked at."""
        options = custom.Options(task=self.name, options=self.options, search_fraction=0.25)
        return custom.Custom(options, self.code, "")

    def training(self) -> str:
        before = self.code.model(True).state_dict()
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            self._trained = self._train(Path(folder) / "checkpoint")
        changed = sum(not torch.equal(before[name], tensor) for name, tensor in self._trained.items())
        return f"{changed} of {len(before)} tensors changed in {2 * self._steps} steps"

    def resume(self) -> str:
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            file = Path(folder) / "checkpoint"
            with suppress(_StoppedError):
                self._train(file, stop_after=self._steps)
            again = self._train(file)
        other = [name for name, tensor in again.items() if not torch.equal(tensor, self._trained[name])]
        if other:
            raise UserError(
                f"a training that was stopped after an epoch and resumed ends with other weights ({other[0]}); keep no "
                "state in the task or the network that state_dict() does not hold, and draw at random only in augment"
            )
        return "a training that was stopped and resumed ends with the same weights"

    @property
    def _steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.workload.train) // BATCH)

    def _train(self, checkpoint: Path, stop_after: int | None = None) -> dict[str, Tensor]:
        """Weights after two epochs.

        Raises:
            _StoppedError: it was to stop after a step.
        """

        def report(step: int, steps: int, note: str = "", /) -> None:
            if stop_after is not None and step > stop_after:
                raise _StoppedError

        recipe = Recipe(epochs=2, lr=1e-3, batch_size=BATCH, warmup_epochs=0, clip_norm=1.0, autocast="fp32")
        with seeded(0):
            model = self.code.model(True)
            args: dict[str, Any] = {"seed": 0, "checkpoint": checkpoint, "compute": torch.device("cpu")}
            fit(model, self.workload, self.workload.train, recipe, **args, checkpoint_every_s=0, report=report)
        return model.state_dict()


class _StoppedError(Exception):
    """A training was stopped on purpose."""


def _halves(num: int) -> tuple[list[int], list[int]]:
    """Indices of two batches."""
    every = list(range(num))
    return every[: (num + 1) // 2], every[(num + 1) // 2 :]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * max(1e-12, b.abs().max().item()))


def _numbers(tensor: Tensor) -> Tensor:
    """Comparable where NaN stands for nothing."""
    return torch.nan_to_num(tensor.double(), nan=-1e300)


def _half(graph: ChannelGraph) -> PruningPlan:
    """Half of the channels of every group."""
    space = SearchSpace.of(graph.groups)
    widths = {name: min(allowed, key=lambda w: abs(w - allowed[-1] / 2)) for name, allowed in space.allowed.items()}
    return PruningPlan.full(graph.groups).replace({name: range(width) for name, width in widths.items()})
