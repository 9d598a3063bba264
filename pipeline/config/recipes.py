"""Recipes by name: values for keys that a run file leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Name = Literal["quick", "standard", "long", "steps", "adamw"]

_STANDARD: Mapping[str, Any] = {
    "epochs": 30,
    "lr": 0.1,
    "weight_decay_on": "weights",
    "warmup_epochs": 2,
    "label_smoothing": 0.1,
    "ema": 0.999,
}
RECIPES: Mapping[Name, Mapping[str, Any]] = MappingProxyType(
    {
        "quick": {"epochs": 5, "weight_decay_on": "weights"},
        "standard": _STANDARD,
        "long": {**_STANDARD, "epochs": 200, "warmup_epochs": 5, "ema": 0.9995, "keep": "best"},
        "steps": {"epochs": 180, "lr": 0.1, "weight_decay": 1e-4, "warmup_epochs": 1, "schedule": "step"},
        "adamw": {**_STANDARD, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0},
    }
)
"""``steps`` is that of He et al. (2016, arXiv 1512.03385, section 4.2) for CIFAR-10, with a short warm-up."""

WITH_ADAMW: Mapping[str, Any] = MappingProxyType({"lr": 1e-3, "weight_decay": 0.05, "weight_decay_on": "weights"})
"""Values that go with the optimizer: those of SGD would let AdamW diverge."""


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section, and those of the recipe it names; what is given wins."""
    name = given.get("recipe")
    named: Mapping[str, Any] = next((values for known, values in RECIPES.items() if known == name), {})
    adamw = given.get("optimizer", named.get("optimizer")) == "adamw" and "optimizer" not in named
    return {**named, **(WITH_ADAMW if adamw else {}), **given}
