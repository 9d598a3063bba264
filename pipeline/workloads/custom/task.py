"""What a task of one's own is: the methods that it must have, those that it may have, and its code."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import Postprocessing
from secateur.pipeline.workloads.custom.calls import blaming, kind
from secateur.pipeline.workloads.custom.metrics import Measure, judged

REQUIRED = {
    "model": "model(self, weights: bool) -> nn.Module",
    "data": 'data(self, split) -> a Dataset of (input, target) for "train" and "test"',
    "loss": "loss(self, outputs, targets) -> a scalar",
    "answers": "answers(self, outputs, targets) -> a tensor (n, ...)",
    "metrics": "metrics(self, answers, targets) -> {name: value}",
}
"""The methods that every task has, and what they look like."""


class Task(Protocol):
    """What a class that ``workload.task`` names must have; it is made with ``workload.options`` as its arguments."""

    def model(self, weights: bool) -> nn.Module:
        """The unpruned network, with the task's trained weights where it has some and ``weights`` is true."""

    def data(self, split: Literal["train", "test"]) -> Dataset[Any]:
        """A data set of (input, target), the same at every call and read: randomness belongs into ``augment``."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training lowers: a scalar, the mean over the items of a batch."""

    def answers(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What ``metrics`` needs of a batch's outputs, shape (n, ...): small, for those of a whole split are kept."""

    def metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, Any]:
        """Name -> value, of all answers of a split at once. The first is what the gate looks at: in [0, 1], higher is
        better. Each further one is (value, unit, "higher" or "lower"), which says what is better."""


class Optional(Protocol):
    """What such a class may have besides."""

    pretrained: bool
    """Whether ``model(True)`` is trained already, so that no baseline is trained; default False."""
    postprocessing: Postprocessing | None
    """What lies between outputs and what a user wants; default None."""
    usage: Mapping[str, Any]
    """What a user of the exported file must know; ``image_size``, ``mean`` and ``std`` let the delivered loader prepare
    images; default empty. May be a method."""

    def example(self) -> Tensor:
        """An input, shape (1, channels, height, width), float32; default the first training item's."""

    def collate(self, items: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of items; default PyTorch's ``default_collate``. Targets of all batches must have the same
        shape but for n: pad what differs."""

    def augment(self, image: Any, target: Any) -> tuple[Any, Any]:
        """A training item, changed at random; ``random``, NumPy and PyTorch are seeded for each item before."""

    def groups(self, split: Literal["train", "test"]) -> Sequence[Any]:
        """For every item what it is of (a patient, a video, a product): a group is in one split only."""

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far outputs are from the unpruned network's, a scalar; default the divergence (KL) of class probabilities
        where targets are class indices, else the mean squared error."""

    def calibration(self) -> Tensor:
        """Inputs that integer precisions take their ranges from, shape (n, channels, height, width), float32; default
        the first training items', as they are."""

    def fingerprint(self) -> str:
        """Names the content of the data, so that it is not read whole whenever a run begins; items keep their order."""


def make_task(name: str, made_of: Any, options: Mapping[str, Any]) -> Task:
    """A task made of its class.

    Args:
        name: what it is called in messages.
        made_of: the class.

    Raises:
        UserError: methods are missing, or it cannot be made with the options.
    """
    missing = [method for method in REQUIRED if not callable(getattr(made_of, method, None))]
    if missing:
        raise UserError(
            f"{name} has no {' and no '.join(f'{method}()' for method in missing)}; write "
            f"{', and '.join(REQUIRED[method] for method in missing)}"
        )
    with blaming(f"{name}({', '.join(options)})", "workload.options are its arguments"):
        task: Task = made_of(**options)
    return task


class OwnCode:
    """A task's code, asked for one thing at a time; whatever it returns is looked at.

    Args:
        name: what the task is called in messages, ``FILE.py:NAME``.
        task: the task.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task = name, task

    def of(self, method: str) -> str:
        """What a method is called in messages."""
        return f"{self.name}.{method}"

    def has(self, method: str) -> bool:
        """Whether the task has a method that it need not have."""
        return callable(getattr(self.task, method, None))

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the task returns.

        Raises:
            UserError: it fails; says where in the user's file.
        """
        return self.attempt(method, getattr(self.task, method), *arguments)

    def attempt(self, what: str, call: Any, *arguments: Any) -> Any:
        """The same of any call into the task's code."""
        with blaming(self.of(what)):
            return call(*arguments)

    def model(self, weights: bool) -> nn.Module:
        """The unpruned network in eval mode.

        Args:
            weights: with the task's trained weights, where it has some.

        Raises:
            UserError: the task's code fails, or returns no network.
        """
        model = self.ask("model", weights)
        if not isinstance(model, nn.Module):
            raise UserError(f"{self.of('model')}({weights}) returned {kind(model)}; return a torch.nn.Module")
        return model.eval()

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What a network of the task gives for inputs: one tensor with a row for each.

        Raises:
            UserError: it fails, or gives something else.
        """
        outputs, where = self.attempt("model(...).forward", model, inputs), self.of("model")
        if not isinstance(outputs, Tensor):
            raise UserError(
                f"{where}: the network gives {kind(outputs)}; it must give one tensor: concatenate several along "
                "one dimension, and take them apart in loss and answers"
            )
        if not outputs.ndim or len(outputs) != len(inputs):
            raise UserError(
                f"{where}: the network gives {kind(outputs)} for {len(inputs)} inputs; one row for each is needed"
            )
        return outputs

    def collated(self, items: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of items: float32 of shape (n, channels, height, width), and (n, ...).

        Raises:
            UserError: they are not one tensor each, of the kinds and shapes that are asked for.
        """
        own = self.has("collate")
        where = self.of("collate") if own else f"{self.name}: items of data, put together,"
        collate = self.task.collate if own else default_collate  # type: ignore[attr-defined]
        with blaming(where, "items of one shape are put together by themselves, others by a method collate(items)"):
            batch = collate(list(items))
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
            raise UserError(f"{where} gave {kind(batch)}; expected two tensors, (inputs, targets)")
        inputs, targets = batch
        if inputs.ndim != 4 or not inputs.is_floating_point() or len(inputs) != len(items):
            raise UserError(
                f"{where} gave inputs of {inputs.dtype} and shape {tuple(inputs.shape)} for "
                f"{number_of(len(items), 'item(s)')}; "
                "an input is a float tensor of shape (channels, height, width)"
            )
        if not targets.ndim or len(targets) != len(items):
            raise UserError(
                f"{where} gave targets of shape {tuple(targets.shape)} for {number_of(len(items), 'item(s)')}; "
                "the first dimension "
                "counts them"
            )
        return inputs.float(), targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A scalar.

        Raises:
            UserError: the task's code fails, or returns no single number.
        """
        loss = self.ask("loss", outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise UserError(f"{self.of('loss')} returned {kind(loss)}; return one number, as a float tensor")
        return loss.reshape(())

    def answers(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Shape (n, ...).

        Raises:
            UserError: the task's code fails, or returns no row for each item.
        """
        answers = self.ask("answers", outputs, targets)
        if not isinstance(answers, Tensor) or not answers.ndim or len(answers) != len(targets):
            raise UserError(
                f"{self.of('answers')} returned {kind(answers)} for {number_of(len(targets), 'item(s)')}; return "
                "a tensor of shape "
                "(n, ...), one row for each item"
            )
        return answers

    def measures(self, answers: Tensor, targets: Tensor) -> dict[str, Measure]:
        """The metrics, in the task's order."""
        return judged(self.ask("metrics", answers, targets), self.of("metrics"))


def code_digest(file: Path) -> str:
    """Names the text of a file and of the modules beside it, or in its package, that it imports, directly or not."""
    digest, seen, waiting = hashlib.sha256(), set[Path](), [file]
    while waiting:
        one = waiting.pop(0)
        if one not in seen:
            seen.add(one)
            digest.update(one.name.encode() + one.read_bytes())
            waiting += sorted({found for folder in _folders(file) for found in _imported(one, folder)})
    return digest.hexdigest()[:16]


def _folders(file: Path) -> list[Path]:
    """Where a file imports its own modules from: the folder it is in, and those above, as far as they are packages."""
    folders = [file.parent]
    while (folders[-1] / "__init__.py").is_file():
        folders.append(folders[-1].parent)
    return folders


def _imported(file: Path, folder: Path) -> set[Path]:
    """The modules in a folder that a file imports."""
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = [folder.joinpath(*name.split(".")) for name in names]
    files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
    return {file for file in files if file.is_file()}
