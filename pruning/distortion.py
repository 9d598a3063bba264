"""How much the outputs of the next layers change when channels go: the damage that AOFP measures, batch by batch.

Ding et al., "Approximated Oracle Filter Pruning for Destructive CNN Width Optimization" (ICML 2019): the damage of
filters is looked at one layer on, not at the loss. What is compared, per layer that reads a group:

- The layer's output with and without the removed channels. Convolutions and linear layers are linear in their input, so
  the part that goes is the same layer run with the weights of the removed channels only.
- Where a batch norm comes next, its output instead, and where an activation comes next, that one's. Batch norms run in
  eval mode. Next is meant literally: no other convolution or linear layer runs in between.

Layers are found where they call ``torch.nn.functional.linear`` or ``conv...`` with a parameter that reads the group;
other readers (the projections inside ``nn.MultiheadAttention``, embeddings, reparametrised weights) are not compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import IntArray, PruningPlan
from secateur.pruning.tracer import tensors_of, undisturbed
from secateur.pruning.weights import inherit

FloatArray = npt.NDArray[np.float64]

OPERANDS = ("input", "weight", "bias")
LINEAR = frozenset({"linear"} | {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)})
"""Torch functions that are linear in their input, called with ``OPERANDS`` first."""

NORM = "batch_norm"
ACTIVATIONS = frozenset(
    "relu relu_ relu6 hardtanh hardtanh_ leaky_relu elu selu silu gelu mish hardswish hardsigmoid sigmoid tanh".split()
)


def distortions(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    removed: Sequence[Mapping[str, Sequence[int]]],
    batches: Iterable[Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, FloatArray]:
    """Answer a ``Distort`` request: mean over images of ``|O - O'|^2 / |O|^2``, the largest over the reading layers.

    The network of ``plan`` runs once per batch, in eval mode; each group is looked at alone. A layer that runs several
    times (a head shared by several maps) counts once per run.

    Args:
        model: the traced model; left as it is.
        graph: its channel groups.
        plan: channels that are there.
        removed: per batch, group name -> channels of ``plan`` that go.
        batches: per batch, images as the model takes them, on its device.
        state: dense-shaped weights; None = the model's own.

    Returns:
        Group name -> shape ``(batches,)``; NaN where a group is not asked for in a batch.

    Raises:
        ValueError: a group is unknown, a channel is not of the plan, or no linear layer or convolution reads a group.
    """
    names = list(dict.fromkeys(name for groups in removed for name in groups))
    network = inherit(model, graph, plan, state)
    readers = _readers(network, graph, plan, names)
    for i, groups in enumerate(removed):
        for name, channels in groups.items():
            if unknown := sorted(set(channels) - set(plan.kept[name])):
                raise ValueError(f"batch {i}: channels {unknown[:5]} of group {name!r} are not kept by the plan")
    answer = {name: np.full(len(removed), np.nan) for name in names}
    with undisturbed(network):
        for i, (groups, images) in enumerate(zip(removed, batches, strict=True)):
            with _Comparison(readers, groups) as comparison:
                network(images)
            for name in groups:
                answer[name][i] = comparison.largest(name)
    return answer


@dataclass(frozen=True, eq=False)
class _Reader:
    """A weight that reads a group, in the pruned network.

    Args:
        group: name of the group.
        dim: the weight's dimension that is summed over.
        positions: channel of the unpruned network -> shape ``(k,)``, its positions along ``dim`` of the pruned weight.
    """

    group: str
    dim: int
    positions: Mapping[int, IntArray]

    def part(self, weight: Tensor, channels: Sequence[int]) -> Tensor:
        """The weight with zeros everywhere but at the given channels."""
        where = np.concatenate([self.positions[c] for c in channels]) if channels else np.zeros(0, dtype=np.int64)
        only = torch.zeros(weight.shape[self.dim], dtype=weight.dtype, device=weight.device)
        only[torch.from_numpy(where).to(weight.device)] = 1
        return weight * only.view([-1 if d == self.dim else 1 for d in range(weight.ndim)])


def _readers(
    network: nn.Module, graph: ChannelGraph, plan: PruningPlan, names: Iterable[str]
) -> dict[int, list[_Reader]]:
    """Identity of a weight -> the groups it reads.

    Raises:
        ValueError: a group is unknown, or no weight reads it.
    """
    tensors, slices = tensors_of(network)[0], graph.slices(plan)
    groups = {group.name: group for group in graph.groups}
    found: dict[int, list[_Reader]] = defaultdict(list)
    for name in names:
        if name not in groups:
            raise ValueError(f"no channel group {name!r}; the network has {list(groups)}")
        members = [m for m in groups[name].members if m.reads]
        if not members:
            raise _no_reader(name)
        for member in members:
            kept = slices.get(member.tensor, {}).get(member.dim, np.arange(graph.shapes[member.tensor][member.dim]))
            positions = {c: np.searchsorted(kept, member.index[c]) for c in plan.kept[name]}
            found[id(tensors[member.tensor])].append(_Reader(name, member.dim, positions))
    return found


def _no_reader(name: str) -> ValueError:
    return ValueError(
        f"group {name!r} is read by no linear layer and no convolution, so removing its channels has no next layer to "
        "look at. Freeze it (search.frozen), or leave it out (search.options.include)."
    )


class _Comparison(TorchFunctionMode):
    """One forward pass; keeps the largest damage per group."""

    def __init__(self, readers: Mapping[int, Sequence[_Reader]], removed: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.readers, self.removed = readers, removed
        self.damage: dict[str, list[float]] = defaultdict(list)
        self.output: Tensor | None = None
        """Output of the layer that ran last, or of the norm or activation after it ..."""
        self.version = 0
        self.without: dict[tuple[str, int], Tensor] = {}
        """... and what it would be without the removed channels, by group and position in ``damage``."""

    def largest(self, name: str) -> float:
        """Damage of a group in this batch."""
        if not self.damage[name]:
            raise _no_reader(name)
        return max(self.damage[name])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in LINEAR:
            return self._layer(func, args, kwargs)
        if name == NORM or name in ACTIVATIONS:
            source = args[0] if args else kwargs.get("input")
            if self.without and isinstance(source, Tensor) and self._is_last(source):
                return self._follow(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_last(self, tensor: Tensor) -> bool:
        """Whether this is the last output, and nobody has written into it since."""
        return tensor is self.output and tensor._version == self.version

    def _layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        given = dict(zip(OPERANDS, args, strict=False)) | kwargs
        others = {name: value for name, value in kwargs.items() if name not in OPERANDS}
        self.output, self.version, self.without = out, out._version, {}
        for reader in self.readers.get(id(given["weight"]), ()):
            if reader.group in self.removed:
                part = reader.part(given["weight"], self.removed[reader.group])
                change = func(given["input"], part, None, *args[len(OPERANDS) :], **others)
                self.without[reader.group, len(self.damage[reader.group])] = out - change
                self.damage[reader.group].append(_damage(out, change))
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A norm or an activation right after a layer: it runs on the output without the channels too."""

        def run(source: Tensor) -> Tensor:
            out: Tensor = func(source, *args[1:], **{n: v for n, v in kwargs.items() if n != "input"})
            return out

        self.without = {key: run(without) for key, without in self.without.items()}
        out = run(args[0] if args else kwargs["input"])
        for (group, place), without in self.without.items():
            self.damage[group][place] = _damage(out, out - without)
        self.output, self.version = out, out._version
        return out


def _damage(output: Tensor, change: Tensor) -> float:
    """Mean over the first dimension of ``|change|^2 / |output|^2``; 0 where nothing changes."""
    whole, gone = (t.reshape(len(t), -1).double().square().sum(1) for t in (output, change))
    return float((gone / whole.clamp_min(torch.finfo(torch.float32).tiny)).mean())
