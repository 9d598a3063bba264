"""MACs, parameters and activation bytes of a plan, without building the network.

MACs are multiply-accumulates of convolutions, linear layers and matrix products at batch 1; FLOPs = 2 x MACs.
Activation bytes are what one inference writes if no operator is fused: the outputs of all operators that are
neither views nor in place. Both are sums of products of dimension lengths, and a length is linear in the group
widths, so costs are a few array operations for any number of plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import nn

from secateur.pruning.channels import ChannelGraph, Products
from secateur.pruning.modes import Watcher
from secateur.pruning.plan import IntArray, PruningPlan
from secateur.pruning.rules import macs_of, operator_of, written_by
from secateur.pruning.tracer import batch_size, undisturbed


@dataclass(frozen=True)
class Cost:
    """Size of a network at batch 1.

    Args:
        macs: multiply-accumulates.
        params: parameters (buffers are not counted).
        activation_bytes: bytes written by all operators that are neither views nor in place.
    """

    macs: int
    params: int
    activation_bytes: int


@dataclass(frozen=True, eq=False)
class Costs:
    """The fields of ``Cost`` for several plans, each of shape ``(plans,)``."""

    macs: IntArray
    params: IntArray
    activation_bytes: IntArray


def cost(graph: ChannelGraph, plan: PruningPlan) -> Cost:
    """Cost of a plan.

    Raises:
        PlanError: the plan belongs to another network.
    """
    found = costs(graph, [plan])
    return Cost(int(found.macs[0]), int(found.params[0]), int(found.activation_bytes[0]))


def costs(graph: ChannelGraph, plans: Sequence[PruningPlan] | IntArray) -> Costs:
    """Costs of many plans.

    Args:
        graph: the traced network.
        plans: plans, or their widths of shape ``(plans, groups)`` in the order of ``graph.groups``.

    Raises:
        PlanError: a plan belongs to another network.
    """
    if not isinstance(plans, np.ndarray):
        for plan in plans:
            plan.validate(graph)
        names = [group.name for group in graph.groups]
        plans = np.array([[plan.widths[n] for n in names] for plan in plans], dtype=np.int64).reshape(
            len(plans), len(names)
        )
    lengths = graph.lengths.constant + plans @ graph.lengths.per_width.T
    return Costs(
        _evaluate(graph.macs, lengths) // graph.batch,
        _evaluate(graph.params, lengths),
        _evaluate(graph.activation_bytes, lengths) // graph.batch,
    )


def _evaluate(products: Products, lengths: IntArray) -> IntArray:
    """Sum of products, shape ``(plans,)``, of dimension lengths of shape ``(plans, dims)``."""
    terms = np.broadcast_to(products.scale, (len(lengths), len(products.scale)))
    for factor in products.factors.T:
        terms = terms * lengths[:, factor]
    total: IntArray = terms.sum(axis=1)
    return total


def count(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> Cost:
    """Cost of a built network, counted while it runs once in eval mode. The model is left as it was."""
    counter = _Counter()
    with undisturbed(model), counter:
        model(*example_inputs, **kwargs)
    batch = batch_size(example_inputs, kwargs)
    return Cost(counter.macs // batch, _numel(model.parameters()), counter.bytes // batch)


def _numel(tensors: Iterable[nn.Parameter]) -> int:
    return sum(tensor.numel() for tensor in tensors)


class _Counter(Watcher):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = operator_of(func)
        products = macs_of(operator, operator.bind(args, kwargs or {}), out)
        self.macs += sum(prod(tensor.shape[d] for tensor, d in product) for product in products)
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in written_by(operator, out))
        return out
