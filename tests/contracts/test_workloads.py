"""What every workload promises. A new one in ``pipeline/workloads`` joins this suite with a section here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.pipeline.config import trust
from secateur.pipeline.config.choices import WORKLOADS
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.workloads import classification
from secateur.pipeline.workloads.testing import CHECKS, Opened, check_options, check_workload
from tests.pipeline.workloads.custom import tasks

SECTIONS: dict[str, dict[str, Any]] = {
    "classification": {"model": {"name": "cifar/resnet8"}, "data": {"source": "digits", "image_size": 8}},
    "custom": {"task": f"{Path(tasks.__file__).name}:Task"},
    "detection": {
        "model": {"name": "small_ssd"},
        "data": {"source": "digits", "image_size": 64, "scenes": 60},
        "metrics": {"least_score": 0.01},
    },
}
"""Small data and a small network for each."""


@functools.cache
def opened(name: str) -> Opened:
    """One for all checks: what is looked at is opened once."""
    return Opened(WORKLOADS.load(name), {"name": name, **SECTIONS[name]})


@pytest.fixture(autouse=True)
def consent() -> None:
    """Consent, as a person would give it, to the task of the tests' own."""
    file = Path(tasks.__file__).with_name("run.yaml")
    config = RunFile(name="tests", workload={"name": "custom", **SECTIONS["custom"]}).lying_in(file.parent)
    trust.allow(entry for found in trust.code_in(config, file) for entry in found.entries)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", WORKLOADS.names())
def test_a_workload_keeps_its_promises(name: str, check: Callable[[Opened], None]) -> None:
    check(opened(name))


@pytest.mark.parametrize("name", WORKLOADS.names())
def test_options_refuse_what_they_do_not_know(name: str) -> None:
    check_options(WORKLOADS.load(name), {"name": name, **SECTIONS[name]})


def of_others(**changed: Any) -> Any:
    """A workload of somebody else's, digits judged by top-1, some of whose methods were changed."""
    made_of = type("Mine", (classification.Classification,), changed)
    return SimpleNamespace(__doc__="Mine.", Options=classification.Options, build=made_of)


def test_a_workload_from_elsewhere_is_checked_alike() -> None:
    check_workload(of_others(), SECTIONS["classification"])


def shaken(self: Any, split: Any, indices: Any, *, train: bool, generator: Any, device: Any) -> Any:
    x, targets = classification.Classification.batch(
        self, split, indices, train=train, generator=generator, device=device
    )
    return (x + torch.rand(()) if train else x), targets


BASE = classification.Classification


def whole(self: Any, split: Any, indices: Any, **given: Any) -> Any:
    x, targets = BASE.batch(self, split, indices, **given)
    return 3 * x, targets


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"metric": "top2"}, "metrics.. lack top2"),
        ({"prepare": lambda self, *given: (BASE.prepare(self, *given)[0] / 2, given[1]), "batch": whole}, "after read"),
        ({"batch": shaken}, "global random numbers were drawn"),
        ({"build_model": lambda self: self.fresh_model().train()}, "training mode"),
        ({"usage": {"mean": (0.5,)}}, "not tuples"),
        ({"fingerprint": property(lambda self: str(id(self)), lambda self, _: None)}, "fingerprint differs"),
        ({"loss": lambda self, outputs, targets: outputs.square().sum(1)}, "no finite scalar"),
        ({"distillation": lambda self, student, teacher, _: -(student - teacher).square().mean()}, "teacher itself"),
        ({"answers": lambda self, outputs, targets, brief=False: outputs - outputs.mean(0)}, "of two batches differ"),
        ({"bound": lambda self, answers, targets, unseen: 0.0}, "images the bound was"),
        ({"divergence": lambda self, outputs, dense: BASE.divergence(self, outputs, dense) - 1}, "diverge"),
    ],
)
def test_a_workload_that_breaks_a_promise_is_told(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_workload(of_others(**changed), SECTIONS["classification"])
