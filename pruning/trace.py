"""The way in: a model, and what may be pruned of it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.pruning.channels import ChannelGraph, freeze_layers
from secateur.pruning.rules import Rule
from secateur.pruning.shapes_only import NeedsValuesError
from secateur.pruning.snapshot import Snapshot
from secateur.pruning.tracer import ALONE, Tracer
from secateur.pruning.trial import settle


def trace(
    model: nn.Module,
    *example_inputs: Any,
    freeze: Iterable[str] = (),
    rules: Mapping[str, Rule] | None = None,
    **kwargs: Any,
) -> ChannelGraph:
    """Run the model once in eval mode and find its channel groups. The model is left as it was.

    Where the code states sizes, the network is also pruned and run on trial: sizes that do not follow the widths
    are tied to those that do, or to an attribute of the module, or freeze what they touch (``secateur.pruning.trial``).

    Args:
        model: any module whose forward runs on the example.
        example_inputs: positional arguments of the forward; the first dimension of the first tensor is the batch.
        freeze: layers whose output channels stay: names of modules or patterns (``head``, ``layer4.*.conv3``).
        rules: rules for further operators, or instead of those of ``secateur.pruning.rules.RULES``, by operator name.
        kwargs: keyword arguments of the forward.

    Raises:
        PruningError: the forward fails on the example (says in which module and with which shapes), or a name
            in ``freeze`` matches no layer.
    """
    with _collecting_new_objects_only(), ALONE:
        before = Snapshot(model)
        try:
            tracer = Tracer(model, rules, values=False, before=before)
            tracer.run(example_inputs, kwargs)
        except NeedsValuesError:
            tracer = Tracer(model, rules, before=before)
            tracer.run(example_inputs, kwargs)
        freeze_layers(tracer, freeze)
        return settle(tracer, example_inputs, kwargs)


@contextmanager
def _collecting_new_objects_only() -> Iterator[None]:
    """Python's collector of cycles leaves alone what is old: a trace makes so many objects that it would look through
    all of the process, which takes as long as several traces of a small network."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
