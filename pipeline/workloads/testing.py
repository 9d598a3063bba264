"""What every workload promises, as checks that an author of one runs on it; no pytest needed.

``check_workload(module, section)`` makes all checks; a test that wants each of them by name goes through ``CHECKS``,
with one ``Opened`` for all. The section names small data and a small network: the data is opened twice, and two dozen
test images go through the network.
"""

from __future__ import annotations

import json
import random
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from secateur.pipeline.workloads import DIVERGENCE_SCORE, Split, Workload
from secateur.pipeline.workloads.data.content import Reading

IMAGES = 24
"""Test images that go through the network, at most; an even number of them."""
CLOSE = 1e-4
"""Relative difference up to which two computations of the same numbers are the same."""
CPU = torch.device("cpu")


class Opened:
    """A workload, and what its network makes of a few images.

    Args:
        module: as those of ``secateur.pipeline.workloads``, or a class in a file: ``Options`` and ``build``.
        section: the ``workload`` section of a run file, with its ``name``.
    """

    def __init__(self, module: Any, section: Mapping[str, Any]) -> None:
        self.module, self.section = module, dict(section)
        self.workload = self.again()

    def again(self) -> Workload:
        """The workload, opened once more."""
        workload: Workload = self.module.build(self.module.Options.model_validate(self.section), Reading())
        return workload

    @cached_property
    def images(self) -> Split:
        """The first test images, an even number."""
        split = self.workload.test
        return split.first(min(IMAGES, len(split) // 2 * 2))

    @cached_property
    def network(self) -> nn.Module:
        return self.workload.build_model()

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The images and their targets."""
        return self.taken(range(len(self.images)))

    @cached_property
    def outputs(self) -> Tensor:
        with torch.inference_mode():
            outputs: Tensor = self.network(self.batch[0])
        return outputs.clone()

    @property
    def targets(self) -> Tensor:
        """The targets of ``batch``."""
        return self.batch[1]

    def taken(self, which: range, *, train: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A batch of the images; of the training images, if ``train``."""
        split = self.workload.train if train else self.images
        generator = torch.Generator().manual_seed(seed) if train else None
        return self.workload.batch(split, torch.tensor(which), train=train, generator=generator, device=CPU)


def check_workload(module: Any, section: Mapping[str, Any]) -> None:
    """All checks, one after the other.

    Args:
        module: as those of ``secateur.pipeline.workloads``, or a class in a file.
        section: the ``workload`` section of a run file that opens small data.

    Raises:
        AssertionError: a promise is broken; says which.
    """
    check_options(module, section)
    opened = Opened(module, section)
    for check in CHECKS:
        check(opened)


def check_options(module: Any, section: Mapping[str, Any]) -> None:
    """It has a docstring, and its options refuse what they do not know."""
    assert (module.__doc__ or "").strip(), "there is no docstring; its first line is how the workload is listed"
    assert "name" in module.Options.model_fields, (
        "Options have no name; write name: Literal[...] with the workload's own"
    )
    try:
        module.Options.model_validate({**section, "no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError("an option that does not exist is taken; Options are made from pipeline.config.schema.Section")


def check_members(opened: Opened) -> None:
    """Everything is there that stages ask for."""
    wanted = {*typing.get_type_hints(Workload), *(name for name in vars(Workload) if not name.startswith("_"))}
    missing = sorted(name for name in wanted if not hasattr(opened.workload, name))
    assert not missing, f"the workload lacks {', '.join(missing)}"


def check_opening(opened: Opened) -> None:
    """Opened again, whatever the global random numbers are, it is the same; and it does not move them."""
    with unmoved(5):
        again = opened.again()
    for name in ("fingerprint", "metric", "search_metric", "pretrained", "notes"):
        assert getattr(again, name) == getattr(opened.workload, name), f"opened again, {name} differs"
    assert again.record == opened.workload.record, "opened again, other images are in the splits"


def check_splits(opened: Opened) -> None:
    """No split is empty, no image is in two of them or twice in one, and the record has all of them."""
    work = opened.workload
    splits = {"train": work.train, "search": work.search, "test": work.test}
    for name, split in splits.items():
        assert len(split), f"the {name} split is empty"
        assert len(np.unique(split.indices)) == len(split), f"an image is twice in the {name} split"
        recorded = sum(member.split == name for member in work.record.members)
        assert recorded == len(split), f"the record has {recorded} images of the {name} split, which has {len(split)}"
    for (one, first), (other, second) in combinations(splits.items(), 2):
        shared = np.intersect1d(first.indices, second.indices) if first.source is second.source else ()
        assert not len(shared), f"{len(shared)} image(s) are in {one} and in {other}"
    assert work.record.fingerprint == work.fingerprint, "the record has another fingerprint than the workload"


def check_summary(opened: Opened) -> None:
    """What people are shown of the data agrees with the splits; what users of a file are told is plain JSON."""
    work, found = opened.workload, opened.workload.summary()
    for name in ("train", "search", "test") if found.classes and found.counted == "images" else ():
        counted, there = sum(getattr(row, name) for row in found.classes), len(getattr(work, name))
        assert counted == there, f"the summary counts {counted} images of the {name} split, which has {there}"
    told = dict(work.usage)
    assert json.loads(json.dumps(told)) == told, "usage is not made of JSON's types: lists, not tuples; text as keys"


def check_batches(opened: Opened) -> None:
    """Images are float32 and finite; one alone is what it is in a batch; training batches follow their generator."""
    inputs, targets = opened.batch
    example = opened.workload.example_input()
    assert inputs.dtype == example.dtype == torch.float32 and inputs.ndim == 4, "inputs are no float32 (n, c, h, w)"
    assert example.shape == (1, *inputs.shape[1:]), (
        f"the example is {tuple(example.shape)}, a batch {tuple(inputs.shape)}"
    )
    assert len(inputs) == len(targets) == len(opened.images), "inputs and targets are not one for each image"
    assert bool(torch.isfinite(inputs).all()), "inputs are not finite"
    last = range(len(inputs) - 1, len(inputs))
    alone = opened.taken(last)
    assert all(torch.equal(a[0], b[-1]) for a, b in zip(alone, opened.batch, strict=True)), (
        "an image alone is another than the same image in a batch"
    )
    few = range(min(4, len(opened.workload.train)))
    with unmoved(5):
        first = opened.taken(few, train=True, seed=1)
    with unmoved(6):
        again = opened.taken(few, train=True, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (
        "two training batches from generators of one seed differ; draw from the generator alone"
    )
    assert first[0].shape[1:] == inputs.shape[1:], "training images have another shape than test images"


def check_reading(opened: Opened) -> None:
    """What is read of an image follows from it and its own seed, whoever reads it and beside which others."""
    work, few = opened.workload, torch.arange(min(4, len(opened.workload.train)))
    with unmoved(5):
        together = work.read(work.train, few, few + 7)
    with unmoved(6):
        alone = work.read(work.train, few[-1:], few[-1:] + 7)
    same = all(torch.equal(a[0], b[-1]) for a, b in zip(alone, together, strict=True))
    assert same, "an image read alone is another than the same image, with the same seed, read with others"
    if not work.reads_anew:
        assert torch.equal(work.read(work.train, few, few + 8)[0], together[0]), "read() follows seeds; set reads_anew"
    plain = work.prepare(*work.read(opened.images, torch.arange(len(opened.images))), None, CPU)
    same = all(torch.equal(a, b) for a, b in zip(plain, opened.batch, strict=True))
    assert same, "batch() gives something else than prepare() after read()"


def check_network(opened: Opened) -> None:
    """It gives one tensor, a row for each image whatever is beside it; fresh weights follow torch's generator."""
    network, inputs = opened.network, opened.batch[0]
    assert not any(part.training for part in network.modules()), "build_model() gives a network in training mode"
    outputs = opened.outputs
    assert isinstance(outputs, Tensor) and len(outputs) == len(inputs), "the network gives no row for each image"
    with torch.inference_mode():
        assert _alike(network(inputs[:1]), outputs[:1]), "an image alone has other outputs than in a batch"
    states = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            states.append(opened.workload.fresh_model().state_dict())
    assert list(states[0]) == list(network.state_dict()), "fresh_model() gives another network than build_model()"
    same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert same, "fresh weights are not drawn from torch's global generator alone"


def check_loss(opened: Opened) -> None:
    """Loss and distillation are finite scalars with gradients; nobody is nearer to the teacher than itself."""
    work, teacher = opened.workload, opened.outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        other = teacher + teacher.abs().mean().clamp(min=0.1) * torch.randn_like(teacher)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "loss": lambda outputs: work.loss(outputs, opened.targets),
        "distillation": lambda outputs: work.distillation(outputs, teacher, 2.0),
    }
    for name, made in losses.items():
        outputs = other.clone().requires_grad_()
        value = made(outputs)
        assert value.ndim == 0 and bool(torch.isfinite(value)), f"{name}() gives no finite scalar"
        (gradient,) = torch.autograd.grad(value, outputs)
        assert bool(torch.isfinite(gradient).all()), f"{name}() has gradients that are not finite"
    nearest, farther = (float(work.distillation(outputs, teacher, 2.0)) for outputs in (teacher, other))
    assert nearest <= farther + CLOSE * abs(farther), "distillation() is lower for others than for the teacher itself"


def check_metrics(opened: Opened) -> None:
    """Metrics are fractions and numbers, and do not depend on how images were put into batches."""
    work, whole = opened.workload, _answers(opened)
    assert len(whole) == len(opened.outputs), "answers() gives no row for each image"
    found, shown = work.metrics(whole, opened.targets), work.test_metrics(whole, opened.targets)
    for name in (work.metric, *_searched(work), "loss"):
        assert name in found, f"metrics() lack {name}"
    assert 0 <= found[work.metric] <= 1, f"{work.metric} is {found[work.metric]}; it must lie in [0, 1]"
    assert all(isinstance(value, int | float) for value in (*found.values(), *shown.values())), "a metric is no number"
    assert _near(shown[work.metric], found[work.metric]), f"test_metrics() give another {work.metric} than metrics()"
    brief = work.metrics(_answers(opened, brief=True), opened.targets)
    for name in ("loss", *(name for name in _searched(work) if name != work.metric)):
        assert name in brief and _near(brief[name], found[name]), f"brief answers give another {name}, or none"
    halves = work.metrics(_answers(opened, parts=2), opened.targets)
    apart = [name for name in found if not _near(halves[name], found[name])]
    assert not apart, f"{', '.join(apart)} of two batches differ from those of one"
    for name, (_, better) in getattr(work, "others", {}).items():
        assert name in shown and better in ("higher", "lower"), f"others name {name}, which test_metrics() do not have"


def check_bounds(opened: Opened) -> None:
    """However many images were seen, the bound is no lower than what the search metric becomes with all of them."""
    work, targets = opened.workload, opened.targets
    answers = _answers(opened, brief=work.search_metric != work.metric)
    finals = [work.metrics(answers, targets)[name] for name in _searched(work)]
    for final, seen in product(finals, range(1, len(targets) + 1)):
        bound = work.bound(answers[:seen], targets[:seen], len(targets) - seen)
        assert bound >= final - CLOSE, f"after {seen} of {len(targets)} images the bound was {bound}, it became {final}"
    assert work.ease(opened.outputs, targets).shape == (len(targets),), "ease() gives no number for each image"


def check_divergence(opened: Opened) -> None:
    """Where a search may go by it: nothing diverges from itself, and nothing by less than 0."""
    work, outputs = opened.workload, opened.outputs
    if not work.search_metric_is_open and work.search_metric != DIVERGENCE_SCORE:
        return
    before, other = work.search_metric, work.going_by(DIVERGENCE_SCORE)
    assert other.search_metric == DIVERGENCE_SCORE, "going_by() gives a workload that goes by something else"
    assert work.search_metric == before, "going_by() changes its own workload"
    itself, others = other.divergence(outputs, outputs), other.divergence(outputs.roll(1, 0), outputs)
    assert itself.shape == others.shape == (len(outputs),), "divergence() gives no number for each image"
    assert float(itself.abs().max()) <= CLOSE, "a network's outputs diverge from themselves"
    assert float(others.min()) >= -CLOSE, "a divergence is below 0"


def check_postprocessing(opened: Opened) -> None:
    """Where there is one: results have a row for each image, agree with themselves, and can be counted and drawn."""
    after = opened.workload.postprocessing
    if after is None:
        return
    results = after.apply(opened.outputs)
    assert len(results) == len(opened.outputs), "apply() gives no row for each image"
    assert after.compare(results, results).ok, "results do not agree with themselves"
    assert after.count(results).shape == (len(results),), "count() gives no number for each image"
    drawn = after.draw(opened.batch[0], results, opened.targets)
    assert drawn.dtype == torch.uint8 and drawn.ndim == 4 and drawn.shape[:2] == (len(results), 3), (
        "draw() gives no uint8 pictures (n, 3, h, w)"
    )


CHECKS: tuple[Callable[[Opened], None], ...] = (
    *(check_members, check_opening, check_splits, check_summary, check_batches, check_reading, check_network),
    *(check_loss, check_metrics, check_bounds, check_divergence, check_postprocessing),
)
"""All of them but that of the options, the quick ones first."""


@contextmanager
def unmoved(seed: int) -> Iterator[None]:
    """See that global random numbers, which begin with a seed, are not drawn from meanwhile.

    Raises:
        AssertionError: they were.
    """
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    before = _states()
    try:
        yield
        assert _states() == before, "global random numbers were drawn; use the generator that is given, or fork"
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def _states() -> tuple[Any, ...]:
    numbers: Any = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), torch.get_rng_state().tolist()


def _searched(work: Workload) -> tuple[str, ...]:
    """The metric of the search, where it is one of ``metrics()``."""
    return () if work.search_metric == DIVERGENCE_SCORE else (work.search_metric,)


def _answers(opened: Opened, *, brief: bool = False, parts: int = 1) -> Tensor:
    """Answers to the images, taken in so many batches."""
    pairs = zip(opened.outputs.chunk(parts), opened.targets.chunk(parts), strict=True)
    return torch.cat([opened.workload.answers(*pair, brief=brief) for pair in pairs])


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= CLOSE * b.abs().max().clamp(min=1.0))


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * max(1.0, abs(b))
