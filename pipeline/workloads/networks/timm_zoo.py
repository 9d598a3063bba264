"""Classifiers of timm (PyTorch Image Models), with what its ``pretrained_cfg`` says of their images and weights.

Nothing is downloaded: weights are taken where timm has put them on this machine.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from secateur.device_profiles.wording import command
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.decode import Fitting
from secateur.pipeline.workloads.networks.preparation import Preparation

LOADS = re.compile(r"pretrained|checkpoint|weights|file|url|cache_dir|scriptable|exportable")
"""Options with which timm would read files or addresses."""
FILES = ("model.safetensors", "pytorch_model.bin")
"""What weights are called in the repositories that timm names."""


def build(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """A classifier with random weights.

    Args:
        name: of the network, with or without the tag of its weights (``resnet18.a1_in1k``).

    Raises:
        UserError: there is none of this name, or the options name files.
        TypeError: it does not take these options.
    """
    timm = _timm()
    check_name(name)
    reading = sorted(option for option in options if LOADS.search(option))
    if reading:
        raise UserError(
            f"model.options of timm/{name} may not name files or weights ({', '.join(reading)}); set model.weights: "
            "timm, or to a file"
        )
    model: nn.Module = timm.create_model(
        _plain(name), pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )
    return model


@cache
def check_name(name: str) -> None:
    """See that timm has such a network.

    Raises:
        UserError: it has not; names the nearest.
    """
    every = _timm().list_models()
    if _plain(name) not in every:
        close = known(every, name).partition("; ")[2]
        raise UserError(f"timm has no network {name!r}; {close or 'see timm.list_models()'}")
    tags = [one.partition(".")[2] for one in _timm().list_pretrained(f"{_plain(name)}.*")]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        raise UserError(f"timm has no weights {tag!r} of {_plain(name)}; {known(tags, tag)}")


def preparation(name: str) -> Preparation | None:
    """How images are prepared for a network's weights; None where timm says nothing of it."""
    check_name(name)
    said = _timm().get_pretrained_cfg(name)
    if said is None or len(said.mean) != 3:
        return None
    high, wide = said.input_size[1:]
    if said.crop_mode == "squash" and said.crop_pct == 1:
        return Preparation(Fitting((high, wide), "stretch", None, said.interpolation), said.mean, said.std)
    short = math.floor(min(high, wide) / said.crop_pct)
    return Preparation(Fitting((high, wide), "crop", short, said.interpolation), said.mean, said.std)


def find_weights(name: str) -> Path:
    """The file of a network's weights on this machine.

    Raises:
        UserError: timm has none for it, or they were never fetched here; says how to.
    """
    check_name(name)
    said = _timm().get_pretrained_cfg(name)
    if said is None or not (said.hf_hub_id or said.url):
        raise UserError(f"timm has no trained weights for {name}; set model.weights to a file, or leave it out")
    for path in _places(said):
        if path.is_file():
            return path
    fetch = f'import timm; timm.create_model("{name}", pretrained=True)'
    raise UserError(
        f"timm's weights for {name} are not on this machine, and nothing is downloaded here. Fetch them once, where "
        f"there is a network: {command('python', '-c', fetch)}; or set model.weights to a file that has them"
    )


def classes_of_weights(name: str) -> int:
    """How many classes its weights know."""
    return int(_timm().get_pretrained_cfg(name).num_classes)


def _places(said: Any) -> list[Path]:
    """Where timm keeps the weights that a ``pretrained_cfg`` names."""
    found = []
    if said.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for name in [said.hf_hub_filename] if said.hf_hub_filename else FILES:
            place = try_to_load_from_cache(said.hf_hub_id, name)
            found += [Path(place)] if isinstance(place, str) else []
    if said.url:
        found.append(Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlsplit(said.url).path).name)
    return found


def _plain(name: str) -> str:
    """The name of the network without the tag of its weights."""
    return name.partition(".")[0]


def _timm() -> Any:
    return importlib.import_module("timm")
