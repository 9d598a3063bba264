"""The number type of a training: chosen once for a network and processor, and by more than chance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.training import trials
from secateur.pipeline.training.precision import faster, likely
from secateur.pipeline.workloads.classification import Classification, Options, build
from tests.numerics import pretend_bf16

CPU, RECIPE = torch.device("cpu"), Recipe(autocast="auto")


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16"), (0.95, "fp32"), (1.0, "fp32"), (1.3, "fp32")])
def test_bf16_has_to_be_clearly_faster(bf16: float, chosen: str) -> None:
    assert faster(lambda precision: bf16 if precision == "bf16" else 1.0) == chosen


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Classification:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    pretend_bf16(monkeypatch, True)
    return build(Options.model_validate({"model": {"name": "mlp", "options": {"hidden": [8]}}}))


def test_a_choice_is_kept_for_the_network_and_read_by_estimates(
    monkeypatch: pytest.MonkeyPatch, digits: Classification
) -> None:
    def chosen(model: nn.Module, faster: str) -> str:
        monkeypatch.setattr(trials, "faster", lambda seconds: faster)
        return trials.precision_of(RECIPE, model, digits, digits.train, CPU)

    model = digits.fresh_model()
    assert likely(RECIPE, model, digits, CPU) == "bf16"  # native, and nobody has tried
    assert chosen(model, "fp32") == "fp32"
    assert chosen(digits.fresh_model(), "bf16") == likely(RECIPE, model, digits, CPU) == "fp32"
    assert chosen(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "bf16") == "bf16"
