"""Training resumes exactly, distils, and stops with a clear word when it diverges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.pipeline.config.schema import Distillation, Recipe
from secateur.pipeline.files import sha256_of
from secateur.pipeline.training.checkpoints import Checkpoint, State, load_weights, save_weights
from secateur.pipeline.training.curve import Fitted, Losses, TrainingError
from secateur.pipeline.training.loop import fit
from secateur.pipeline.training.recipe import optimizer_of
from secateur.pipeline.workloads.classification import Classification
from secateur.pipeline.workloads.classification.losses import distillation_loss
from tests.pipeline.helpers import digits

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=128, autocast="fp32")


class KilledError(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def workload() -> Classification:
    return digits(augment="shift")


def trained(workload: Classification, checkpoint: Path, die_at: int = -1, recipe: Recipe = RECIPE) -> nn.Module:
    def report(done: int, total: int, note: str = "") -> None:
        if done == die_at:
            raise KilledError

    torch.manual_seed(0)
    model = workload.build_model()
    options: dict[str, Any] = {"seed": 1, "compute": CPU, "checkpoint_every_s": 0, "report": report}
    fit(model, workload, workload.train.first(384), recipe, checkpoint=checkpoint, **options)
    return model


@pytest.mark.parametrize("die_at", [1, 3, 5, 7, 9])
def test_a_killed_training_continues_to_the_same_weights(workload: Classification, tmp_path: Path, die_at: int) -> None:
    expected = trained(workload, tmp_path / "a.ckpt").state_dict()
    with pytest.raises(KilledError):
        trained(workload, tmp_path / "b.ckpt", die_at)
    resumed = trained(workload, tmp_path / "b.ckpt").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "b.ckpt").exists()


def test_a_moving_average_of_the_weights_is_what_training_ends_with(workload: Classification, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 2.0, "ema": 0.9})
    seen: list[dict[str, torch.Tensor]] = []

    torch.manual_seed(0)
    model = workload.build_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def report(done: int, total: int, note: str = "") -> None:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    small = workload.train.first(384)
    fit(model, workload, small, recipe, seed=1, checkpoint=tmp_path / "a.ckpt", compute=CPU, report=report)
    for step, state in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for name, tensor in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    found = dict(model.named_parameters())  # statistics are taken anew for these weights
    expected = {name: expected[name] for name in found}
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert not all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in seen[-1].items())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_ends_with_the_statistics_of_its_last_weights(
    workload: Classification, tmp_path: Path, ema: float
) -> None:
    """Over training images without augmentation, the average of batches; not what moved along with older weights."""
    model = trained(workload, tmp_path / "a.ckpt", recipe=RECIPE.model_copy(update={"epochs": 0.5, "ema": ema}))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    seen: list[list[torch.Tensor]] = [[] for _ in norms]
    for norm, values in zip(norms, seen, strict=True):
        norm.register_forward_pre_hook(lambda _, args, values=values: values.append(args[0].transpose(0, 1).flatten(1)))
        norm.running_mean, norm.running_var = torch.zeros_like(norm.bias), torch.ones_like(norm.bias)
        norm.train()
    with torch.no_grad():
        for chosen in torch.arange(384).split(128):
            model(workload.batch(workload.train, chosen, train=False, generator=None, device=CPU)[0])
    for (mean, variance), values in zip(kept, seen, strict=True):
        assert mean is not None
        assert variance is not None
        assert torch.allclose(mean, torch.stack([batch.mean(1) for batch in values]).mean(0), atol=1e-4)
        assert torch.allclose(variance, torch.stack([batch.var(1) for batch in values]).mean(0), rtol=1e-3)


def test_a_killed_training_continues_its_average_too(workload: Classification, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"ema": 0.95})
    expected = trained(workload, tmp_path / "a.ckpt", recipe=recipe).state_dict()
    with pytest.raises(KilledError):
        trained(workload, tmp_path / "b.ckpt", 5, recipe)
    resumed = trained(workload, tmp_path / "b.ckpt", recipe=recipe).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_cut_short_begins_again(workload: Classification, tmp_path: Path) -> None:
    expected = trained(workload, tmp_path / "a.ckpt").state_dict()
    with pytest.raises(KilledError):
        trained(workload, tmp_path / "b.ckpt", 5)
    content = (tmp_path / "b.ckpt").read_bytes()
    (tmp_path / "b.ckpt").write_bytes(content[: len(content) // 2])
    resumed = trained(workload, tmp_path / "b.ckpt").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


ODD_CHECKPOINTS: dict[str, object] = {
    "a list": [1],
    "a number": 3,
    "other parts": {"model": 1, "optimizer": [], "step": None},
}


@pytest.mark.parametrize("kind", ["zeros", "empty", *ODD_CHECKPOINTS])
def test_a_checkpoint_that_is_none_begins_again(kind: str, workload: Classification, tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    if kind in ODD_CHECKPOINTS:
        torch.save(ODD_CHECKPOINTS[kind], file)
    else:
        file.write_bytes(b"" if kind == "empty" else bytes(4096))
    model = workload.build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = State(model, optimizer_of(model, RECIPE), None, Losses(""))
    assert not Checkpoint(file).read(state, CPU)
    assert state.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_divergence_names_the_step_and_the_fix(workload: Classification, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"lr": 1e6, "epochs": 20})
    with pytest.raises(TrainingError, match="lower lr"):
        trained(workload, tmp_path / "x.ckpt", recipe=recipe)


def test_distillation_pulls_the_student_to_its_teacher(workload: Classification, tmp_path: Path) -> None:
    teacher = trained(workload, tmp_path / "t.ckpt")
    images, _ = workload.batch(workload.train, torch.arange(256), train=False, generator=None, device=CPU)

    def distance(weight: float) -> float:
        torch.manual_seed(5)
        student = workload.build_model()
        fit(
            student,
            workload,
            workload.train.first(384),
            RECIPE,
            seed=2,
            checkpoint=tmp_path / "s.ckpt",
            compute=CPU,
            teacher=teacher,
            distill=Distillation(weight=weight),
        )
        with torch.no_grad():
            return distillation_loss(student(images), teacher(images), 1.0).item()

    assert distance(1.0) < distance(0.0)


@given(st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6), st.floats(0.5, 8))
def test_distillation_loss_is_zero_only_for_equal_outputs(logits: list[float], temperature: float) -> None:
    a = torch.tensor(logits).view(2, 3)
    assert distillation_loss(a, a, temperature).item() == pytest.approx(0, abs=1e-5)
    shifted = a + torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert distillation_loss(shifted, a, temperature).item() > 0


def test_weights_survive_the_file_bit_for_bit(workload: Classification, tmp_path: Path) -> None:
    state = workload.build_model().state_dict()
    digest = save_weights(tmp_path / "w.safetensors", state)
    assert digest == sha256_of(tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_weights_are_read_into_aligned_memory(tmp_path: Path) -> None:
    state = {f"t{n}": torch.arange(n, dtype=torch.float32) for n in (1, 3, 5, 7, 9)}
    save_weights(tmp_path / "w.safetensors", state)
    found = load_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert {tensor.data_ptr() % 64 for tensor in found.values()} == {0}


# -- what recipes ask of the loop, on a network that takes no time -----------------------------------------------------


class Spied:
    """A workload that says nothing but what another one does, and remembers what it judged."""

    def __init__(self, workload: Classification, *accuracies: float) -> None:
        self._workload, self._accuracies, self.judged = workload, list(accuracies), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workload, name)

    def metrics(self, answers: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        self.judged += 1
        return {"top1": self._accuracies.pop(0) if self._accuracies else 0.5}


def small_network(seed: int = 0) -> nn.Module:
    """Without anything that looks at more than one image at a time; it drops a tenth of what it sees."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, 10)
    return nn.Sequential(*layers)


def small_fit(
    workload: Any, folder: Path, die_at: int = -1, model: nn.Module | None = None, last: Path | None = None, **keys: Any
) -> tuple[nn.Module, Fitted]:
    def report(done: int, total: int, note: str = "") -> None:
        if done == die_at:
            raise KilledError

    model = model or small_network()
    recipe = Recipe.model_validate({"epochs": 4, "lr": 0.05, "batch_size": 32, "autocast": "fp32", **keys})
    options: dict[str, Any] = {"held_out": workload.search, "checkpoint_every_s": 0, "report": report, "last": last}
    split = workload.train.first(100)
    fitted = fit(model, workload, split, recipe, seed=1, checkpoint=folder / "c", compute=CPU, **options)
    return model, fitted


def same(a: nn.Module, b: nn.Module, **tolerance: float) -> bool:
    other = b.state_dict()
    return all(torch.allclose(tensor, other[name], **tolerance) for name, tensor in a.state_dict().items())


KINDS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw"},
    "average": {"ema": 0.9},
    "best": {"keep": "best", "ema": 0.9},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("die_at", [2, 4, 7])
def test_any_recipe_goes_on_exactly_in_the_middle_of_an_epoch(
    kind: str, die_at: int, workload: Classification, tmp_path: Path
) -> None:
    expected, fitted = small_fit(workload, tmp_path, **KINDS[kind])
    with pytest.raises(KilledError):
        small_fit(workload, tmp_path, die_at, **KINDS[kind])
    found, resumed = small_fit(workload, tmp_path, **KINDS[kind])
    assert same(found, expected, rtol=0, atol=0)
    assert resumed == fitted


def test_the_best_epoch_is_kept_and_said(workload: Classification, tmp_path: Path) -> None:
    short, _ = small_fit(workload, tmp_path, schedule="constant", epochs=2)
    found, fitted = small_fit(Spied(workload, 0.3, 0.8, 0.4, 0.8), tmp_path, schedule="constant", keep="best")
    assert (fitted.keep, fitted.kept_epoch) == ("best", 2)
    assert [epoch.metrics["top1"] for epoch in fitted.curve] == [0.3, 0.8, 0.4, 0.8]
    assert same(found, short, rtol=0, atol=0)


def test_the_weights_of_the_last_epoch_lie_beside_the_best(workload: Classification, tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    short, _ = small_fit(workload, tmp_path, schedule="constant", epochs=2)
    whole, _ = small_fit(workload, tmp_path, schedule="constant", last=file)
    assert not file.exists(), "the last ones are kept anyway"
    judged = Spied(workload, 0.3, 0.8, 0.4, 0.8)
    best, _ = small_fit(judged, tmp_path, schedule="constant", keep="best", last=file)
    left = load_weights(file)
    assert same(best, short, rtol=0, atol=0)
    assert all(torch.equal(tensor, left[name]) for name, tensor in whole.state_dict().items())


def test_judging_an_epoch_changes_nothing_in_a_training(workload: Classification, tmp_path: Path) -> None:
    spied = Spied(workload)
    judged, fitted = small_fit(spied, tmp_path, keep="best")
    assert spied.judged == 4
    assert fitted.kept_epoch == 1  # the first of equally good ones
    last, _ = small_fit(workload, tmp_path)
    first, _ = small_fit(workload, tmp_path, epochs=4)
    assert same(last, first, rtol=0, atol=0)
    assert not same(judged, last)


@pytest.mark.parametrize("parts", [2, 3, 100])
def test_parts_of_a_batch_add_up_to_its_gradient(parts: int, workload: Classification, tmp_path: Path) -> None:
    """Whatever the number of parts, and where the last batch is a small one."""
    whole, _ = small_fit(workload, tmp_path, model=without_dropout())
    found, _ = small_fit(workload, tmp_path, model=without_dropout(), accumulate=parts)
    assert same(found, whole, rtol=1e-3, atol=1e-5)


def without_dropout() -> nn.Module:
    network = small_network()
    assert isinstance(network, nn.Sequential)
    network[3] = nn.Identity()
    return network


def test_a_curve_holds_every_epoch(workload: Classification, tmp_path: Path) -> None:
    _, fitted = small_fit(workload, tmp_path, epochs=2.5, warmup_steps=1, schedule="step", milestones=[0.5])
    assert [epoch.epoch for epoch in fitted.curve] == [1, 2, 2.5]
    assert [epoch.lr for epoch in fitted.curve] == pytest.approx([0.05, 0.005, 0.005])
    assert fitted.curve[-1].loss < fitted.curve[0].loss
    assert 0 <= fitted.curve[-1].metrics["top1"] <= 1
    assert Fitted.of_json(json.loads(json.dumps(fitted.to_json()))) == fitted


def test_a_loss_that_is_no_number_is_told_with_its_step(workload: Classification, tmp_path: Path) -> None:
    """Although losses are not read in every step."""

    class Broken(Spied):
        steps = 0

        def loss(self, *args: Any) -> torch.Tensor:
            self.steps += 1
            loss: torch.Tensor = self._workload.loss(*args)
            return loss * (float("nan") if self.steps == 7 else 1)

    with pytest.raises(TrainingError, match=r"nan at step 6 of 16.*lower lr"):
        small_fit(Broken(workload), tmp_path)
