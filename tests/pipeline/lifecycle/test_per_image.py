"""How sure the accuracy on the test split is, and which of its images changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.pipeline.lifecycle import per_image
from tests.pipeline.helpers import digits


def logits_of(found: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(found, 10).float()


@pytest.fixture
def answers() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two networks on 200 images: 180 and 170 right, of which the first 160 are the same."""
    targets = torch.arange(200) % 10
    before, after = targets.clone(), targets.clone()
    before[180:] = (before[180:] + 1) % 10
    after[160:190] = (after[160:190] + 1) % 10
    return [logits_of(before), logits_of(after)], targets


def test_the_interval_of_an_accuracy_is_that_of_a_binomial_and_the_change_is_paired(answers: Any) -> None:
    told = per_image.accuracy_of(digits(), *answers)
    assert (told.images, told.reason) == (200, "")
    assert told.compact.value == pytest.approx(0.85) and told.change.value == pytest.approx(-0.05)
    half = 1.96 * (0.85 * 0.15 / 200) ** 0.5
    assert told.compact.high - told.compact.low == pytest.approx(2 * half, rel=0.15)
    paired = 1.96 * ((20 + 10) / 200 - 0.05**2) ** 0.5 / 200**0.5  # 20 lost, 10 won
    assert told.change.high - told.change.low == pytest.approx(2 * paired, rel=0.15)


def test_a_metric_that_does_not_follow_from_single_images_is_resampled_from_the_answers(answers: Any) -> None:
    workload = digits()
    workload.metric = "balanced_accuracy"
    told = per_image.accuracy_of(workload, *answers)
    assert told.compact.low < told.compact.value < told.compact.high


def test_few_images_cannot_tell(answers: Any) -> None:
    (before, after), targets = answers
    told = per_image.accuracy_of(digits(), [before[:29], after[:29]], targets[:29])
    assert told.reason == "cannot tell: 29 images, under 30"
    assert told.change.low is None and told.change.high is None


def test_images_that_changed_are_kept_with_pictures_unless_these_are_unwanted(answers: Any, tmp_path: Path) -> None:
    workload = digits()
    assert set(per_image.keep(tmp_path, workload, *answers, pictures=False)) == {"test.npz"}
    assert set(per_image.keep(tmp_path, workload, *answers, pictures=True)) == {"test.npz", "test-pictures.json"}
    with np.load(tmp_path / "test.npz") as told:
        lost = (told["baseline.found"] == told["baseline.target"]) & (told["compact.found"] != told["compact.target"])
    rows = json.loads((tmp_path / "test-pictures.json").read_text())["changed"]
    assert [lost[row["image"]] for row in rows] == [True] * 6 + [False] * 6
    assert all(row["picture"].startswith("data:image/png;base64,") for row in rows)
