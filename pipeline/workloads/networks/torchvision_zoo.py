"""Classifiers of torchvision, with the weights that it trained on ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.decode import Fitting
from secateur.pipeline.workloads.networks.preparation import Preparation


def names() -> list[str]:
    """All of its classifiers."""
    import torchvision.models as zoo

    found: list[str] = zoo.list_models(zoo)
    return found


def build(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """A classifier with random weights.

    Raises:
        UserError: the images are not RGB.
        TypeError: it does not take these options.
    """
    import torchvision.models as zoo

    if in_channels != 3:
        raise UserError(
            f"{name} takes RGB images, the data has {number_of(in_channels, 'channel(s)')}; set data.channels: 3"
        )
    model: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def weights_address(name: str) -> str:
    """Where its best weights for a classifier are.

    Raises:
        UserError: it has none for this network.
    """
    return str(_best(name).url)


def classes_of_weights(name: str) -> int:
    """How many classes its best weights for a classifier know."""
    return len(_best(name).meta["categories"])


def preparation(name: str) -> Preparation:
    """How images are prepared for its best weights for a classifier."""
    said = _best(name).transforms()
    side = int(said.crop_size[0])
    fitting = Fitting((side, side), "crop", int(said.resize_size[0]), str(said.interpolation.value))
    return Preparation(fitting, tuple(said.mean), tuple(said.std))


def read(name: str, path: Path) -> dict[str, Tensor]:
    """Its weights with today's names of the network's tensors; some of its files have older ones.

    torchvision reads the file in its own way, which may run code: ``read_weights`` has to find that it has none first.

    Args:
        path: where the file is.

    Raises:
        UserError: it holds other weights.
    """
    import torchvision.models as zoo

    try:
        with torch.random.fork_rng(devices=[]):
            return dict(zoo.get_model(name, weights="DEFAULT").state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{path} holds other weights than torchvision's for {name}; remove it to fetch them again"
        ) from error


def _best(name: str) -> Any:
    import torchvision.models as zoo

    if name not in names():
        raise UserError(f"torchvision has no trained weights for network {name}; {known(names(), name)}")
    return zoo.get_model_weights(name).DEFAULT
