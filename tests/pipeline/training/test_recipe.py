"""Recipes: what a name stands for, which parameters decay, and the learning rate of every step."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.pipeline.config import recipes
from secateur.pipeline.config.schema import FinetuneSection, Recipe, RunFile
from secateur.pipeline.training.recipe import Schedule, optimizer_of

BASE: dict[str, Any] = {"name": "a", "workload": {"name": "classification"}}


def test_every_name_is_a_recipe_that_a_key_overrides() -> None:
    assert set(get_args(recipes.Name)) == recipes.RECIPES.keys()
    for name, values in recipes.RECIPES.items():
        found = FinetuneSection(recipe=name, epochs=3.5)
        assert found.epochs == 3.5
        assert {key: getattr(found, key) for key in values} == {**values, "epochs": 3.5}


def test_what_a_run_directory_keeps_of_a_recipe_is_that_recipe() -> None:
    """Even if the table is another one some day, and whatever it was called."""
    found = Recipe(recipe="adamw", lr=0.002)
    kept = found.model_dump(mode="json")
    assert Recipe.model_validate(kept) == found
    assert Recipe.model_validate({**kept, "recipe": None}).model_copy(update={"recipe": "adamw"}) == found


def test_a_name_changes_a_digest_only_by_what_it_stands_for() -> None:
    spelled = {**BASE, "baseline": dict(recipes.RECIPES["steps"])}
    digests = {
        RunFile.model_validate(content).digest for content in (spelled, BASE | {"baseline": {"recipe": "steps"}})
    }
    assert len(digests) == 1
    assert RunFile.model_validate(BASE).digest not in digests


def test_adamw_alone_brings_a_rate_that_it_can_learn_with() -> None:
    assert Recipe(optimizer="adamw").lr == 0.001
    assert Recipe(optimizer="adamw", lr=0.1).lr == 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_weights_decay_where_a_recipe_says_so(optimizer: str) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    recipe = Recipe.model_validate({"optimizer": optimizer, "weight_decay": 0.5, "weight_decay_on": "weights"})
    optimizer_ = optimizer_of(network, recipe)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_.step()
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"0.weight", "3.weight"}


def rates(epochs: float = 10, part: tuple[float, float] = (0.0, 1.0), **keys: Any) -> list[float]:
    schedule = Schedule(Recipe.model_validate({"epochs": epochs, "lr": 1.0, **keys}), 10, part)
    return [schedule.lr(step) for step in range(schedule.steps)]


def test_a_warm_up_of_steps_rises_to_the_full_rate_and_no_further() -> None:
    found = rates(warmup_steps=4, schedule="constant")
    assert found[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert set(found[4:]) == {1.0}


def test_steps_fall_at_the_milestones_in_whatever_order_they_stand() -> None:
    found = rates(warmup_steps=0, schedule="step", milestones=[0.8, 0.4], milestone_factor=0.5)
    assert [found[step] for step in (1, 39, 40, 79, 80, 99)] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


@given(st.sampled_from(["cosine", "step", "constant"]), st.integers(0, 200), st.sampled_from([0.25, 0.5]))
def test_parts_of_a_training_have_the_rates_of_the_whole(schedule: str, warmup: int, cut: float) -> None:
    keys = {"schedule": schedule, "warmup_steps": warmup}
    parts = rates(10 * cut, (0.0, cut), **keys) + rates(10 * (1 - cut), (cut, 1.0), **keys)
    assert parts == pytest.approx(rates(**keys))
