"""One training for every width: a network whose weights fit any width vector.

Two sources of weights behind one interface, ``weights_for``:

- ``PruningNet`` (Liu et al., "MetaPruning", ICCV 2019, arXiv 1903.10258): per layer a small generator of two
  fully-connected layers maps the keep ratios involved to the weights of the *full* layer, which are then cut.
- *shared* (Yu et al., "Slimmable Neural Networks", ICLR 2019, arXiv 1812.08928): one set of dense weights, cut. A
  generator has ``hidden`` times as many numbers as its layer, so layers above ``max_outputs`` are shared in a
  PruningNet too; ``max_outputs = 0`` shares them all.

``Supernet`` trains either: every step draws a random width vector and runs the *pruned* network with weights that
gradients flow through. Which channels stay at a width is given as an order (``SearchSpace.decode``): the leading ones
(the source), or the most salient ones of pretrained weights, so that nothing has to be permuted.

Our choices: a generator begins as the layer's present weights plus a small part that depends on the widths (source:
fresh random layers), so training may begin with pretrained weights; vectors (biases, batch-norm scales) are shared
(source: no scales at all); one batch norm whose statistics are re-estimated for every plan, instead of one per scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.width_evolution import SCALES
from secateur.pruning.surgery import check_model, rebuild, resize

START = 0.1
"""Size of a generator's width-dependent part at the start, relative to the weights (rms)."""


def scaled_space(graph: ChannelGraph) -> SearchSpace:
    """Every group at the source's 31 scales."""
    sizes = {group.name: group.size for group in graph.groups}
    allowed = {n: tuple(sorted({max(1, round(s * size)) for s in SCALES.tolist()})) for n, size in sizes.items()}
    return SearchSpace(sizes, allowed, PruningPlan.full(graph.groups))


def involved(graph: ChannelGraph) -> dict[str, tuple[str, ...]]:
    """Per tensor that loses entries: the groups it depends on, in network order (own outputs and inputs alike)."""
    groups: dict[str, dict[str, None]] = {}
    for group in graph.groups:
        for member in group.members:
            groups.setdefault(member.tensor, {}).setdefault(group.name)
    return {tensor: tuple(names) for tensor, names in groups.items()}


def weights_for(tensors: Mapping[str, Tensor], graph: ChannelGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """Dense-shaped tensors for the widths of a plan, by first name; gradients flow through.

    Args:
        tensors: shared tensors under their own names, generators under ``_names`` (what ``PruningNet.tensors`` gives).
        graph: channel groups of the network.
        plan: what will be kept; only its widths matter here.
    """
    ratios = {name: width / plan.sizes[name] for name, width in plan.widths.items()}
    groups, dense = involved(graph), {}
    for name, shape in graph.shapes.items():
        if name in tensors:
            dense[name] = tensors[name]
            continue
        first, offset, second, weights = (tensors[part] for part in _names(name))
        ratio = torch.tensor([ratios[group] for group in groups[name]], dtype=first.dtype, device=first.device)
        hidden = F.relu(F.linear(ratio, first, offset))
        dense[name] = F.linear(hidden, second, weights).reshape(shape)
    return dense


def _names(tensor: str) -> tuple[str, str, str, str]:
    """Names of the generator of a tensor: weight and bias of its first layer, then of its second."""
    return f"{tensor}@1.weight", f"{tensor}@1.bias", f"{tensor}@2.weight", f"{tensor}@2.bias"


class PruningNet(nn.Module):
    """Weights of a network for any width vector.

    Args:
        model: the dense network; its weights are where the training begins. Not kept.
        graph: its channel groups.
        hidden: units of a generator's inner layer (source: 32; 64 for MobileNetV2).
        max_outputs: a layer with more numbers is shared instead of generated; 0 = all layers are.
        seed: of the generators' random part.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, hidden: int = 32, max_outputs: float = 1e6, seed: int = 0
    ) -> None:
        super().__init__()
        self.graph = graph
        self._slots: dict[str, str] = {}
        generator, groups = torch.Generator().manual_seed(seed), involved(graph)
        for name, tensor in check_model(model, graph).items():
            old = tensor.detach().clone()
            if not isinstance(tensor, nn.Parameter):
                self._add(name, old, None)
            elif name not in groups or tensor.ndim < 2 or not tensor.requires_grad or tensor.numel() > max_outputs:
                self._add(name, old, tensor.requires_grad)
            else:
                for part, value in zip(_names(name), _start(old, len(groups[name]), hidden, generator), strict=True):
                    self._add(part, value, True)

    def _add(self, name: str, value: Tensor, trained: bool | None) -> None:
        """Keep a tensor under a name without dots, as torch wants it; ``trained`` None = a buffer."""
        slot = self._slots[name] = f"t{len(self._slots)}"
        if trained is None:
            self.register_buffer(slot, value)
        else:
            self.register_parameter(slot, nn.Parameter(value, trained))

    def tensors(self) -> dict[str, Tensor]:
        """What ``weights_for`` makes weights from: shared tensors, buffers and generators by name."""
        return {name: getattr(self, slot) for name, slot in self._slots.items()}

    def weights_for(self, plan: PruningPlan) -> dict[str, Tensor]:
        """Dense-shaped tensors for the widths of a plan, by first name; gradients flow through."""
        return weights_for(self.tensors(), self.graph, plan)


def _start(weight: Tensor, inputs: int, hidden: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The four tensors of a generator that begins near ``weight``."""

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(weight)

    bound = 1 / math.sqrt(inputs)  # torch's own start of a linear layer
    rms = max(weight.double().square().mean().sqrt().item(), 1e-8)
    second = torch.randn(weight.numel(), hidden, generator=generator).to(weight) * (START * rms / math.sqrt(hidden))
    return uniform(bound, hidden, inputs), uniform(bound, hidden), second, weight.flatten()


class Supernet(nn.Module):
    """The network at a random width vector in every forward pass, to be trained like any other module.

    Widths are drawn from the seed and the number of the step, which is part of the state: a training that is resumed
    from a checkpoint draws on as if it had never stopped. In eval mode it is the full network.

    Args:
        model: the dense network; only its structure is used.
        weights: where the weights come from.
        space: allowed widths; every group draws each of its own equally often.
        order: group -> shape ``(size,)``, higher = kept at smaller widths.
        seed: of the widths.
    """

    steps: Tensor
    images: Tensor

    def __init__(
        self,
        model: nn.Module,
        weights: PruningNet,
        space: SearchSpace,
        order: Mapping[str, npt.NDArray[np.float64]],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.weights, self.space, self.order, self.seed = weights, space, order, seed
        self.frame = Frame(model, weights.graph)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def draw(self, step: int) -> PruningPlan:
        """The plan that is trained in a step."""
        rng = np.random.default_rng([self.seed, step])
        return self.space.decode([rng.choice(self.space.allowed[name]) for name in self.space.names], self.order)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs of the pruned network of this step, as the network itself gives them."""
        plan = self.draw(int(self.steps)) if self.training else self.space.full
        if self.training:
            self.steps += 1
            self.images += len(inputs[0])
        return self.frame.run(self.weights, plan, *inputs, training=self.training)


class Frame:
    """The structure of a network, to be run at any plan with weights made for it; built once, and never trained itself.

    Where a forward keeps something of its widths in the modules, every pass gets a structure of its own.

    Args:
        model: the dense network; its weights are not used.
        graph: its channel groups.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.model, self.graph = model, graph
        shapes, plan = graph.shapes, PruningPlan.full(graph.groups)
        self.shells = {n: t.to("meta") for n, t in check_model(model, graph).items() if n in shapes}
        self.network = _Resized(self.rebuilt(plan), self)

    def rebuilt(self, plan: PruningPlan) -> nn.Module:
        """A copy of the network without weights."""
        return rebuild(self.model, self.graph, plan, self.shells)

    def run(self, weights: PruningNet, plan: PruningPlan, *inputs: Tensor, training: bool = True) -> Tensor:
        """Outputs of the pruned network with weights made for its plan; gradients reach ``weights``."""
        slices = self.graph.slices(plan)
        tensors = {name: _cut(dense, slices.get(name, {})) for name, dense in weights.weights_for(plan).items()}
        tensors = {n: t if t.requires_grad else t.clone() for n, t in tensors.items()}  # statistics change in place
        if self.graph.remade:
            self.network = _Resized(self.rebuilt(plan), self)
        outputs: Tensor = functional_call(
            self.network.train(training), {f"network.{n}": t for n, t in tensors.items()}, (plan, *inputs)
        )
        return outputs


class _Resized(nn.Module):
    """A network whose layers take the sizes of the tensors that they are called with."""

    def __init__(self, network: nn.Module, frame: Frame) -> None:
        super().__init__()
        self.network, self._frame = network, frame

    def forward(self, plan: PruningPlan, *inputs: Tensor) -> Tensor:
        frame = self._frame
        resize(self.network, frame.model, frame.graph, plan, frame.shells)
        outputs: Tensor = self.network(*inputs)
        return outputs


def _cut(tensor: Tensor, kept: Mapping[int, IntArray]) -> Tensor:
    """The kept positions along each of the given dimensions; gradients flow through (leading ones: a view)."""
    for dim, positions in kept.items():
        if positions[-1] == len(positions) - 1:
            tensor = tensor.narrow(dim, 0, len(positions))
        else:
            tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return tensor
