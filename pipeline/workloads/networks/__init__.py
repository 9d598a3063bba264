"""Classifiers by name: the papers' small networks, torchvision's, timm's, and a user's own.

====================================  =================================================================================
``model.name``                        the network
====================================  =================================================================================
``cifar/NAME``, ``mlp``,              of this package (``small.py``)
``mobilenet_v1``
``torchvision/NAME``, or ``NAME``     a classifier of torchvision
``timm/NAME``                         a classifier of timm, an extra
``FILE.py:FACTORY``,                  what ``FACTORY(num_classes, **options)`` returns, with consent
``PACKAGE.MODULE:FACTORY``            (``secateur.pipeline.config.trust``)
====================================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.pipeline.config import renamed, trust
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.networks import timm_zoo, torchvision_zoo
from secateur.pipeline.workloads.networks.preparation import Preparation
from secateur.pipeline.workloads.networks.small import SMALL

PLACE = ("workload", "model", "name")
Zoo = Literal["small", "torchvision", "timm", "own"]
WAYS = (
    "a network is named in one of three ways: by name (cifar/resnet56, cifar/vgg16, mlp, mobilenet_v1, "
    "torchvision/NAME, timm/NAME); as FILE.py:FACTORY beside the run file; or as PACKAGE.MODULE:FACTORY, where "
    "FACTORY(num_classes, **options) returns the nn.Module"
)


@dataclass(frozen=True)
class Named:
    """A network that a run file names.

    Args:
        zoo: where it is from.
        name: what it is called there.
    """

    zoo: Zoo
    name: str

    def build(self, num_classes: int, shape: Sequence[int], options: Mapping[str, Any]) -> nn.Module:
        """The network with random weights.

        Args:
            shape: channels, height and width of the images.

        Raises:
            UserError: it does not take these images or options.
        """
        try:
            match self.zoo:
                case "small":
                    return SMALL[self.name](num_classes, shape, **options)
                case "torchvision":
                    return torchvision_zoo.build(self.name, num_classes, shape[0], options)
                case "timm":
                    return timm_zoo.build(self.name, num_classes, shape[0], options)
                case "own":
                    return trust.factory(self.name, options)(num_classes, **options)
        except TypeError as error:
            given = "these options" if options else "the number of classes, which is all that it is given"
            raise UserError(f"network {self.name} does not take {given}: {error}") from error

    def check(self, options: Mapping[str, Any]) -> None:
        """See that there is a builder of one's own before any image is read; its file is imported.

        Raises:
            UserError: it cannot be imported, or there is no such builder in it.
        """
        if self.zoo == "own":
            trust.factory(self.name, options)

    def preparation(self, weights: str | None) -> Preparation | None:
        """How its zoo wants images to be prepared; None where it does not say.

        Args:
            weights: ``model.weights``: torchvision says it of its own weights only.
        """
        if self.zoo == "timm":
            return timm_zoo.preparation(self.name)
        return torchvision_zoo.preparation(self.name) if weights == self.zoo == "torchvision" else None


def named(name: str) -> Named:
    """The network that ``model.name`` means; nothing of a user's own is imported.

    Raises:
        UserError: there is none of this name; says how networks are named, and the nearest.
    """
    name = renamed.newest(PLACE, name)
    if ":" in name:
        return Named("own", name)
    if name.endswith(".py"):
        raise UserError(f"{name} is a file; after a colon comes what builds the network in it: {name}:build")
    zoo, slash, rest = name.partition("/")
    if slash and zoo == "timm":
        timm_zoo.check_name(rest)
        return Named("timm", rest)
    plain = rest if slash and zoo == "torchvision" else name
    if plain in SMALL:
        return Named("small", plain)
    there = torchvision_zoo.names()
    if plain not in there:
        close = known([*SMALL, *(f"torchvision/{one}" if slash else one for one in there)], name).partition("; ")[2]
        raise UserError(f"unknown network {name!r}{f'; {close}' if close else ''} ({WAYS})")
    return Named("torchvision", plain)


def build_network(name: str, num_classes: int, shape: Sequence[int], options: Mapping[str, Any]) -> nn.Module:
    """A network by name, with random weights; as ``named`` and ``Named.build``."""
    return named(name).build(num_classes, shape, options)


def class_tensors(build: Callable[[int], nn.Module], num_classes: int) -> tuple[str, ...]:
    """The tensors that a network has for its classes: those whose shape follows from how many there are.

    Args:
        build: number of classes -> network.
    """
    one, more = (_shapes(build, number) for number in (num_classes, num_classes + 1))
    return tuple(name for name, shape in one.items() if more.get(name) != shape)


def _shapes(build: Callable[[int], nn.Module], num_classes: int) -> dict[str, torch.Size]:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                state: Mapping[str, Tensor] = build(num_classes).state_dict()
        except (RuntimeError, NotImplementedError, UserError):  # builders that look at values
            state = build(num_classes).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}
