"""A task of one's own as a workload: what it must return, how its data is split, and what names it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import Split, Workload, calibration_images, custom
from secateur.pipeline.workloads.custom.metrics import judged
from secateur.pipeline.workloads.custom.task import OwnCode, code_digest, make_task
from tests.pipeline.workloads.custom.tasks import Task

CPU = torch.device("cpu")


def opened(made_of: type = Task, text: str = "", **options: Any) -> custom.Custom:
    section = custom.Options(task="tasks.py:Task", options=options)
    return custom.Custom(section, OwnCode(section.task, make_task(section.task, made_of, options)), text)


def batch(workload: Workload, split: Split, *, train: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return workload.batch(split, torch.arange(len(split)), train=train, generator=generator, device=CPU)


def contents(split: Split) -> set[bytes]:
    return {split.source.contents[index] for index in split.indices}


# -- the contract


def test_metrics_of_batches_are_those_of_the_whole_split_and_loss_comes_along() -> None:
    workload: Workload = opened()
    model, (images, targets) = workload.build_model(), batch(workload, workload.train)
    with torch.inference_mode():
        outputs = model(images)
    parts = [workload.answers(o, t) for o, t in zip(outputs.split(5), targets.split(5), strict=True)]
    found = workload.metrics(torch.cat(parts), targets)
    right = (outputs.argmax(1) == targets).float().mean().item()
    assert list(found) == ["hits", "misses", "loss"] and workload.metric == workload.search_metric == "hits"
    assert found["hits"] == pytest.approx(right) and found["misses"] == pytest.approx(100 * (1 - right))
    loss = nn.functional.cross_entropy(outputs, targets).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert opened().others == {"misses": ("%", "lower")}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.int64, torch.float32, torch.float64, torch.bool, torch.bfloat16]),
    st.lists(st.integers(1, 3), max_size=3),
)
def test_answers_of_any_shape_and_type_reach_metrics_unchanged(dtype: torch.dtype, shape: list[int]) -> None:
    reached: list[Tensor] = []

    class Own(Task):
        def answers(self, outputs: Tensor, targets: Tensor) -> Tensor:
            drawn = torch.randn(len(targets), *shape, generator=torch.Generator().manual_seed(len(targets)))
            return (1000 * drawn).to(dtype)

        def metrics(self, answers: Tensor, targets: Tensor) -> dict[str, Any]:
            reached.append(answers)
            return {"hits": 0.5}

    workload, targets = opened(Own), torch.zeros(6, dtype=torch.long)
    packed = workload.answers(torch.zeros(6, 2), targets)
    workload.metrics(packed, targets)
    expected = workload.code.answers(torch.zeros(6, 2), targets)
    assert reached[-1].dtype == dtype and torch.equal(reached[-1], expected)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"miou": 1.2}, "must lie in [0, 1]"),
        ({"miou": -3.0}, "must lie in [0, 1]"),
        ({"miou": torch.ones(3)}, "one number"),
        ({"miou": 0.5, "rmse": 2.1}, '(value, unit, "higher" or "lower")'),
        ({"miou": 0.5, "rmse": (2.1, "mm", "small")}, '(value, unit, "higher" or "lower")'),
        ({"mIoU": 0.5}, "small letters"),
        ({"macs": 0.5}, "taken"),
        ({"p50_ms": 0.5}, "taken"),
        ({}, "the gate's first"),
        (0.5, "a mapping"),
    ],
)
def test_metrics_that_nobody_can_use_are_refused_in_plain_words(returned: Any, said: str) -> None:
    with pytest.raises(UserError, match=r"task\.py:Task\.metrics") as refused:
        judged(returned, "task.py:Task.metrics")
    assert said in str(refused.value)


def test_everything_wrong_with_metrics_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"'a': .*; 'B': .*; 'c': "):
        judged({"a": 2.0, "B": (1, "", "lower"), "c": 1.0}, "")


def test_a_gate_s_metric_that_is_nan_counts_as_the_worst() -> None:
    class Own(Task):
        def metrics(self, answers: Tensor, targets: Tensor) -> dict[str, Any]:
            return {"hits": torch.nan}

    workload, targets = opened(Own), torch.zeros(4, dtype=torch.long)
    assert workload.metrics(workload.answers(torch.zeros(4, 2), targets), targets)["hits"] == 0.0


def test_missing_methods_are_named_together_with_what_they_look_like() -> None:
    class Half:
        def model(self, weights: bool) -> None: ...
        def data(self, split: str) -> None: ...

    with pytest.raises(
        UserError, match=r"no loss\(\) and no answers\(\) and no metrics\(\); write loss\(self, outputs"
    ):
        make_task("task.py:Half", Half, {})


def returning(method: str, value: Any) -> type:
    return type("Own", (Task,), {method: lambda self, *arguments: value})


@pytest.mark.parametrize(
    ("method", "value", "said"),
    [
        ("model", "resnet", "return a torch.nn.Module"),
        ("data", None, "return a torch.utils.data.Dataset"),
        ("data", [], "is empty"),
        ("data", [torch.zeros(1, 8, 8)] * 3, r"return \(input, target\)"),
        ("data", [(torch.zeros(8, 8), 0)] * 3, r"\(channels, height, width\)"),
        ("data", [(torch.zeros(1, 8, 8, dtype=torch.uint8), 0)] * 3, "a float tensor"),
        ("data", [(torch.zeros(1, 8, 8), 0)] * 3, "none can be held out"),
        ("loss", torch.zeros(3), "one number"),
        ("loss", 0.5, "as a float tensor"),
        ("answers", torch.zeros(3, 2), "one row for each item"),
        ("groups", [1, 2], "for 40 items"),
    ],
)
def test_what_a_method_returns_is_refused_with_the_fix(method: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(returning(method, value))


def test_a_network_with_several_outputs_is_told_to_concatenate_them() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UserError, match="concatenate several"):
        opened(returning("model", Two()))


def test_what_fails_in_a_task_is_told_with_its_line() -> None:
    class Own(Task):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.no_such_thing

    with pytest.raises(
        UserError, match=r"tasks\.py:Task\.loss failed: AttributeError: .* \(test_custom\.py, line \d+\)"
    ):
        opened(Own)


def test_label_smoothing_is_refused_because_a_task_s_loss_has_none() -> None:
    with pytest.raises(UserError, match="set it to 0"):
        opened().loss(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), 0.1)


# -- the data


def test_the_search_split_is_carved_from_training_data_by_content() -> None:
    class Shuffled(Task):
        def data(self, split: str) -> TensorDataset:
            tensors = super().data(split).tensors
            order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(5))
            return TensorDataset(*(tensor[order] for tensor in tensors))

    own, shuffled = opened(items=200), opened(Shuffled, items=200)
    assert len(own.train) + len(own.search) == len(own.test) == 200 and 5 <= len(own.search) <= 40
    assert not contents(own.train) & contents(own.search)
    assert contents(own.search) == contents(shuffled.search)
    assert own.fingerprint == shuffled.fingerprint


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=40, max_size=40).filter(lambda groups: len(set(groups)) > 1))
def test_a_group_is_never_torn(groups: list[int]) -> None:
    class Grouped(Task):
        def groups(self, split: str) -> list[Any]:
            return [(split, group) for group in groups]

    workload = opened(Grouped)
    of = lambda split: {groups[index] for index in split.indices}  # noqa: E731
    assert of(workload.train) and of(workload.search) and not of(workload.train) & of(workload.search)


def test_a_group_in_training_and_test_data_is_refused() -> None:
    class Leaky(Task):
        def groups(self, split: str) -> list[int]:
            return [0, *range(1 if split == "train" else 100, 39 + (1 if split == "train" else 100))]

    with pytest.raises(UserError, match=r"1 group is in the training and in the test data"):
        opened(Leaky)


def test_equal_items_in_training_and_test_data_are_told() -> None:
    class Leaky(Task):
        def data(self, split: str) -> TensorDataset:
            return super().data("train")

    assert any(" the content of one in" in note for note in opened(Leaky).notes)


def test_a_task_that_names_its_data_is_not_read_whole() -> None:
    read: list[int] = []

    class Named(Task):
        def data(self, split: str) -> Any:
            inner = super().data(split)

            class Counting:
                def __len__(self) -> int:
                    return 1000

                def __getitem__(self, index: int) -> Any:
                    read.append(index)
                    return inner[index % len(inner)]

            return Counting()

        def fingerprint(self) -> str:
            return "release 3"

    assert len(opened(Named).train) > 800
    assert len(read) <= custom.LOOKED_AT


def test_augmentation_follows_the_seed_of_each_item_whatever_it_draws_from_and_leaves_randomness_alone() -> None:
    class Noisy(Task):
        def augment(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return image + torch.randn(()) + np.random.rand() + random.random(), target

    workload = opened(Noisy)
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    first, again, other = (batch(workload, workload.train, train=True, seed=seed)[0] for seed in (0, 0, 1))
    plain = batch(workload, workload.train)[0]
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, plain)
    assert len({round(float(d), 4) for d in (first - plain).mean((1, 2, 3))}) == len(plain)


def test_items_of_different_sizes_need_a_collate_of_their_own() -> None:
    class Ragged(Task):
        def data(self, split: str) -> Any:
            return [(torch.rand(1, 8, 8), torch.arange(1 + i % 3)) for i in range(9)]

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.mean()

        def answers(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return targets

        def metrics(self, answers: Tensor, targets: Tensor) -> dict[str, Any]:
            return {"hits": 0.5}

    with pytest.raises(UserError, match=r"a method collate\(items\)"):
        opened(Ragged)

    class Padded(Ragged):
        def collate(self, items: list[Any]) -> tuple[Tensor, Tensor]:
            rows = [nn.functional.pad(target, (0, 3 - len(target)), value=-1) for _, target in items]
            return torch.stack([image for image, _ in items]), torch.stack(rows)

    assert batch(opened(Padded), opened(Padded).train)[1].shape[1] == 3


# -- learning from the unpruned network


def test_distillation_is_the_divergence_of_class_scores_else_the_squared_error() -> None:
    workload = opened()
    a, b = torch.randn(5, 2), torch.randn(5, 2)
    kl = nn.functional.kl_div((a / 4).log_softmax(1), (b / 4).softmax(1), reduction="batchmean") * 16
    assert workload.distillation(a, b, 4.0) == pytest.approx(kl.item(), rel=1e-5)
    maps = [t[:, :, None, None].expand(5, 2, 3, 3) for t in (a, b)]
    assert workload.distillation(*maps, 4.0) == pytest.approx(kl.item(), rel=1e-5)

    class Regression(Task):
        def data(self, split: str) -> TensorDataset:
            images, targets = super().data(split).tensors
            return TensorDataset(images, targets.float())

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss(outputs[:, 0], targets)

    assert opened(Regression).distillation(a, b, 4.0) == pytest.approx(nn.functional.mse_loss(a, b).item())


# -- what names a task


def test_code_options_and_data_are_part_of_the_fingerprint() -> None:
    class Trained(Task):
        pretrained = True

        def model(self, weights: bool) -> nn.Module:
            return super().model(weights)

    prints = {
        opened().fingerprint,
        opened(text="changed").fingerprint,
        opened(width=4).fingerprint,
        opened(items=41).fingerprint,
        opened(Trained).fingerprint,
    }
    assert len(prints) == 5 and opened().fingerprint in prints
    assert opened(Trained).pretrained and not opened().pretrained


def test_the_digest_of_code_covers_the_modules_beside_it_that_it_imports(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("import torch\nfrom parts import net\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "net.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("a = 1\n")
    (tmp_path / "unused.py").write_text("b = 1\n")
    before = code_digest(tmp_path / "task.py")
    (tmp_path / "unused.py").write_text("b = 2\n")
    assert code_digest(tmp_path / "task.py") == before
    (tmp_path / "helper.py").write_text("a = 2\n")
    assert code_digest(tmp_path / "task.py") != before


def test_ranges_of_integers_are_taken_from_what_the_task_says_or_from_training_items_as_they_are() -> None:
    class Calibrated(Task):
        def calibration(self) -> Tensor:
            return torch.ones(3, 1, 8, 8, dtype=torch.float64)

    plain, own = opened(), opened(Calibrated)
    assert torch.equal(calibration_images(own, 5), torch.ones(3, 1, 8, 8))
    assert torch.equal(calibration_images(plain, 5), batch(plain, plain.train.first(5))[0])

    class Flat(Task):
        def calibration(self) -> Tensor:
            return torch.ones(3, 8)

    with pytest.raises(UserError, match=r"calibration returned .*return a tensor \(n, channels"):
        calibration_images(opened(Flat), 5)


def test_a_task_of_a_package_is_known_by_the_modules_of_its_package(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "task.py").write_text("from .net import build\nimport mine.losses\n")
    (package / "net.py").write_text("a = 1\n")
    (package / "losses.py").write_text("b = 1\n")
    digests = {code_digest(package / "task.py")}
    for name in ("net", "losses"):
        (package / f"{name}.py").write_text("c = 2\n")
        digests.add(code_digest(package / "task.py"))
    assert len(digests) == 3


def test_a_task_is_named_as_a_class_in_a_file() -> None:
    with pytest.raises(ValueError, match=r"task\.py:Task"):
        custom.Options(task="package/module:Task")
