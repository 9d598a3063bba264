"""Batch norm over several GPUs: what can be seen of it without one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import UserError
from secateur.pipeline.training import loop
from secateur.pipeline.training.distributed import Group
from secateur.pipeline.training.lesson import Lesson
from secateur.pipeline.training.loop import fit
from secateur.pipeline.training.synchronised import check_norms, check_synchronised, synchronised
from secateur.pipeline.workloads.networks import build_network
from secateur.pruning.trace import trace
from tests.pipeline.helpers import digits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("cifar/resnet8", 10, (1, 8, 8), {})


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]


def test_it_is_torchs_own_conversion_within_and_the_same_network_after() -> None:
    """Keys, outputs and updated statistics in either mode; afterwards the very modules, and what was learned."""
    model, images = network(), torch.rand(6, 1, 8, 8)
    own = copy.deepcopy(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    modules = dict(model.named_modules())
    with synchronised(model):
        assert {type(norm) for norm in norms(model)} == {nn.SyncBatchNorm}
        assert list(model.state_dict()) == list(converted.state_dict()) == list(own.state_dict())
        for mode in (True, False):
            outputs = [each.train(mode)(images) for each in (model, converted, own)]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert dict(model.named_modules()) == modules
    assert {type(norm) for norm in norms(model)} == {nn.BatchNorm2d}
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(images), own(images))
    assert trace(model, images[:1]).report() == trace(own, images[:1]).report()


def test_hooks_stay() -> None:
    """Steps of integers and distilled features hang on norms."""
    model, seen = nn.Sequential(nn.BatchNorm2d(2)), list[Tensor]()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with synchronised(model):
        model(torch.rand(3, 2, 4, 4))
    model(torch.rand(3, 2, 4, 4))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("compute", "count", "said"), [(CPU, 2, "GPUs only, and this run trains on the CPU"), (CUDA, 1, "compute_count")]
)
def test_it_is_refused_where_nothing_is_to_be_synchronised(compute: torch.device, count: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_synchronised(Recipe(sync_batchnorm=True), compute, count)
    check_synchronised(Recipe(), compute, count)
    check_synchronised(Recipe(sync_batchnorm=True), CUDA, 2)


def test_norms_of_a_class_of_their_own_are_refused() -> None:
    """``convert_sync_batchnorm`` would make plain ones of them, without what else they do."""

    class NormAndActivation(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    check_norms(network())
    with pytest.raises(UserError, match="1 is a NormAndActivation"):
        check_norms(nn.Sequential(nn.Conv2d(1, 2, 1), NormAndActivation(2)))


@pytest.mark.parametrize(("size", "wanted", "kind"), [(2, True, nn.SyncBatchNorm), (2, False, nn.BatchNorm2d)])
def test_a_training_of_several_has_it_until_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, wanted: bool, kind: type
) -> None:
    """In a group without the other processes: what is learned from, what is kept and what is left."""
    seen = set[Any]()

    class Watched(Lesson):
        def __call__(self, *arguments: Any) -> Tensor:
            seen.update(type(norm) for norm in norms(self.model))
            return super().__call__(*arguments)

    class Alone(Group):
        def wrap(self, model: nn.Module, compute: torch.device) -> nn.Module:
            return model

        def mean(self, value: float, compute: torch.device) -> float:
            return value

    monkeypatch.setattr(loop, "Lesson", Watched)
    workload, model = digits(augment="none"), network()
    recipe = Recipe(epochs=2, batch_size=32, sync_batchnorm=wanted, keep="best", ema=0.9, autocast="fp32")
    terms = loop.Terms(
        *(model, workload, workload.train.first(64), recipe, 0, tmp_path / "c", 0.0, CPU, "fp32", (0.0, 1.0))
    )
    loop._train(Alone(0, size), terms, held_out=workload.search.first(32), recalibration_images=32)
    assert seen == {kind}
    assert {type(norm) for norm in norms(model)} == {nn.BatchNorm2d}
    assert list(model.state_dict()) == list(network().state_dict())


def test_one_process_alone_never_has_it(tmp_path: Path) -> None:
    """Auxiliary trainings are one's, by the same recipe."""
    workload, model = digits(augment="none"), network()
    recipe, few = Recipe(epochs=1, batch_size=32, autocast="fp32"), workload.train.first(64)
    terms: Any = {"seed": 0, "compute": CPU, "checkpoint": tmp_path / "c"}
    fit(model, workload, few, recipe, **terms)
    other = network()
    fit(other, workload, few, recipe.model_copy(update={"sync_batchnorm": True}), **terms)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
