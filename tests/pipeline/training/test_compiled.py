"""Compiled steps of a training: whether they pay, and that nothing of them is left behind. No GPU is needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from secateur.pipeline.config.schema import Distillation, Recipe
from secateur.pipeline.training import compiled, lesson
from secateur.pipeline.training.compiled import Timed, UnlikeError, certain, timed
from secateur.pipeline.training.loop import fit
from secateur.pipeline.training.trials import is_compiled
from secateur.pipeline.workloads.classification import Classification
from secateur.pipeline.workloads.networks import build_network
from tests.pipeline.helpers import digits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RECIPE = Recipe(epochs=2, batch_size=24, autocast="fp32", compile="auto")


@pytest.fixture(scope="module")
def workload() -> Classification:
    return digits(augment="none")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have trainings on this processor go the way of those on a GPU."""
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compiled, "certain", lambda recipe, compute: certain(recipe, CUDA))


def by(monkeypatch: pytest.MonkeyPatch, make: Callable[[nn.Module], compiled.Forward]) -> None:
    """Put another compiler in the place of PyTorch's."""
    monkeypatch.setattr(lesson, "compiled", make)


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("cifar/resnet8", 10, (1, 8, 8), {})


def failure() -> Exception:
    return BackendCompilerFailed(nn.Identity(), RuntimeError("no compiler for C was found"), None)


@pytest.mark.parametrize(
    ("steps", "compiled_s", "pays"), [(1000, 0.5, True), (50, 0.5, False), (10**6, 0.95, False), (10**6, 1.2, False)]
)
def test_compiling_has_to_shorten_the_whole_training_clearly(steps: int, compiled_s: float, pays: bool) -> None:
    assert Timed(eager_s=1.0, compiled_s=compiled_s, compile_s=60.0).pays(steps) is pays


@pytest.mark.parametrize(
    ("keys", "on_cuda"),
    [({}, None), ({"compile": "on"}, True), ({"compile": "off"}, False), ({"sync_batchnorm": True}, False)],
)
def test_a_processor_never_tries(keys: dict[str, Any], on_cuda: bool | None) -> None:
    assert certain(Recipe(**keys), CPU) is False
    assert certain(Recipe(**keys), CUDA) is on_cuda


def test_both_kinds_are_timed_in_turn_and_the_fastest_of_each_counts() -> None:
    """Compiling is what the first steps take: of a whole batch, and of the last one of an epoch."""
    times = {True: iter([30.0, 10.0, 0.3, 0.2, 0.9]), False: iter([9.0, 1.0, 1.0, 1.0, 0.8, 0.7, 0.9])}
    asked = list[tuple[bool, int]]()

    def step(kind: bool, images: int) -> tuple[float, float]:
        asked.append((kind, images))
        return next(times[kind]), 2.3

    assert timed(step, 128, 80, steps=1000) == Timed(eager_s=0.7, compiled_s=0.2, compile_s=40.0)
    assert asked == [(False, 128)] * 4 + [(True, 128), (True, 80)] + [(True, 128), (False, 128)] * 3


def test_nothing_is_compiled_for_a_training_that_is_soon_over() -> None:
    def step(kind: bool, images: int) -> tuple[float, float]:
        assert not kind
        return 0.1, 2.3

    assert timed(step, 128, 80, steps=100) is None


@pytest.mark.parametrize("loss", [3.0, float("nan")])
def test_a_compiled_step_that_computes_something_else_is_no_choice(loss: float) -> None:
    with pytest.raises(UnlikeError, match="instead of 2"):
        timed(lambda kind, images: (1000.0, loss if kind else 2.0), 8, 8, 1)


@pytest.mark.usefixtures("on_a_gpu")
def test_what_was_found_is_kept_and_decides_by_the_length_of_the_training(
    monkeypatch: pytest.MonkeyPatch, workload: Classification, tmp_path: Path
) -> None:
    said: list[str] = []
    tried = itertools.count()

    def found(step: compiled.Step, images: int, last: int, steps: int) -> Timed:
        next(tried)
        return Timed(1.0, 0.5, 60.0)

    def decided(epochs: float) -> bool:
        recipe = RECIPE.model_copy(update={"epochs": epochs})
        few = workload.train.first(48)
        return is_compiled(recipe, network(), workload, few, CPU, "fp32", said.append)

    monkeypatch.setattr(compiled, "timed", found)
    assert [decided(epochs) for epochs in (1, 1000)] == [False, True]
    assert next(tried) == 1
    assert said == ["A compiled step of training takes 500.0 ms instead of 1000.0, and compiling 60 s"]
    for file in (tmp_path / "home" / "compilations").iterdir():
        file.write_text("{")
    assert decided(1000)
    assert next(tried) == 3


@pytest.mark.usefixtures("on_a_gpu")
def test_where_compiling_fails_the_training_goes_on_without_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, workload: Classification, tmp_path: Path
) -> None:
    def fail(images: Tensor) -> Tensor:
        raise failure()

    by(monkeypatch, lambda network: fail)
    monkeypatch.setattr(compiled, "LEAST_S", 0.0)
    said: list[str] = []
    few = workload.train.first(48)
    terms: Any = {"seed": 1, "compute": CPU, "checkpoint": tmp_path / "c", "say": said.append}
    for _ in range(2):
        fit(network(), workload, few, RECIPE, **terms)
        assert len(said) == 1 and "not compiled" in said[0] and "no compiler for C" in said[0]
    monkeypatch.setattr(compiled, "read", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what does not come from compiling is hidden by nothing
        fit(network(), workload, few, RECIPE, **terms)


@pytest.mark.usefixtures("on_a_gpu")
def test_compiling_that_fails_in_mid_training_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, workload: Classification, tmp_path: Path
) -> None:
    """Batches of another size are compiled anew, in mid-training."""

    def make(network: nn.Module) -> compiled.Forward:
        def forward(images: Tensor) -> Tensor:
            if len(images) != RECIPE.batch_size:
                raise failure()
            return network(images)  # type: ignore[no-any-return]

        return forward

    by(monkeypatch, make)
    weights, said = [], list[str]()
    for wanted in ("on", "off"):
        model, recipe = network(), RECIPE.model_copy(update={"compile": wanted})
        fit(
            *(model, workload, workload.train.first(60), recipe),
            **{"seed": 1, "compute": CPU, "checkpoint": tmp_path / "c", "say": said.append},  # type: ignore[arg-type]
        )
        weights.append(model.state_dict())
    assert len(said) == 1 and "not compiled" in said[0]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


class _StoppedError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_gpu")
def test_a_compiled_training_is_that_training_and_its_files_are_those_of_any(
    monkeypatch: pytest.MonkeyPatch, workload: Classification, tmp_path: Path
) -> None:
    """By the parts of PyTorch's compiler that need no C: curve, keys of the checkpoint, a resume without compiling."""
    by(monkeypatch, partial(torch.compile, backend="aot_eager"))
    few, distill = workload.train.first(60), Distillation(features=0.1)

    def train(compile: str, model: nn.Module, stop: int = 0) -> list[float]:
        def report(step: int, steps: int, note: str = "", /) -> None:
            if step == stop:
                raise _StoppedError

        teacher, recipe = network(), RECIPE.model_copy(update={"compile": compile, "ema": 0.5})
        options: Any = {"teacher": teacher, "distill": distill, "checkpoint_every_s": 0.0, "report": report}
        said: list[str] = []
        fitted = fit(
            *(model, workload, few, recipe),
            **{"seed": 1, "compute": CPU, "checkpoint": tmp_path / "c", "say": said.append, **options},
        )
        assert said == []
        return [epoch.loss for epoch in fitted.curve]

    eager, model, stopped = network(), network(), network()
    losses = train("off", eager)
    assert train("on", model) == pytest.approx(losses, rel=1e-4)
    assert list(model.state_dict()) == list(eager.state_dict())
    with pytest.raises(_StoppedError):
        train("on", stopped, stop=4)
    kept = torch.load(tmp_path / "c", weights_only=True)
    assert list(kept["model"]) == list(kept["average"][1]) == list(eager.state_dict())
    assert train("off", stopped) == pytest.approx(losses, rel=1e-4)
