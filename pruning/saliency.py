"""How much each channel matters: criteria over weights and gradients, and plans that keep the best.

A group may have several producing layers (the stages of a residual network) and several readers. Criteria of produced
weights are summed over the producing layers.

========================= ====================================================================================
name                      score of channel k
========================= ====================================================================================
``l1``, ``l2``            norm of its filter W[k] (Li et al., ICLR 2017)
``fpgm``                  sum of distances from W[k] to the other filters (He et al., CVPR 2019)
``bn_scale``              ``|gamma_k|`` of the batch norms that carry it (Liu et al., ICCV 2017)
``taylor``                sum of ``|w dL/dw|`` over everything that makes it (Molchanov et al., CVPR 2019)
``snip_l1`` ...           EvoFC's four criteria on G = ``|dL/dmask|`` at mask 1 = ``|w dL/dw|`` (2024; see below)
``weight_l1`` ...         the same four on ``|w|``
``weight_dependency``     its filter's and its readers' relative ``|w|`` (CPMC, arXiv 2011.03240)
``bn_dependency``         ``|gamma_k|`` times the norm of what reads it (DAFP, arXiv 2005.02634)
``random``                a number drawn under the seed
========================= ====================================================================================

EvoFC's four, G_f being the vector of filter f: ``l1`` sum of G_f; ``l2`` ``|G_f| / |G_layer|``; ``max`` max of G_f over
the sum of G_layer; ``fpgm`` the sum of distances between unit vectors ``G_f / |G_f|``. The source scores the ``floor(C
p)`` filters with the smallest such sums 0, which leaves as many as the ratio p keeps: the order of the sums decides.

Our choices: Taylor's criterion is the form over weights (biases and scales of norms included), because every traced
group has weights while a single activation per channel exists in simple groups only; as the network is used, in eval
mode. SNIP's gradients are taken in training mode: a fresh network has no running statistics yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import ChannelGroup, Member, PruningPlan
from secateur.pruning.tracer import tensors_of, undisturbed

FloatArray = npt.NDArray[np.float64]
Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

OPTIONS = ("batches", "images")
"""Options of ``channel_saliency``."""


# -- criteria of a table of filters: shape (rows, weights per row) -> (rows,) ------------------------------------------


def l1(rows: Tensor) -> Tensor:
    """Sum of magnitudes of each row."""
    return rows.abs().sum(dim=1)


def l2(rows: Tensor) -> Tensor:
    """Euclidean norm of each row."""
    return rows.square().sum(dim=1).sqrt()


def distances(rows: Tensor) -> Tensor:
    """Sum of Euclidean distances to the other rows; the rows near their geometric median have the smallest."""
    return torch.cdist(rows, rows).sum(dim=1)


def relative_l2(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, as a share of the whole table's."""
    return l2(rows) / _positive(rows.square().sum().sqrt())


def sensitivity(rows: Tensor) -> Tensor:
    """Largest entry of each row, as a share of the sum of the whole table."""
    return rows.abs().amax(dim=1) / _positive(rows.abs().sum())


def directions(rows: Tensor) -> Tensor:
    """Sum of Euclidean distances between the rows as unit vectors (zeros stay zeros)."""
    return distances(rows / _positive(l2(rows))[:, None])


def _positive(divisor: Tensor) -> Tensor:
    """The divisor, 1 where it is zero."""
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))


# -- what a criterion sees, and the table ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Look:
    """One channel group of a network, as a criterion sees it.

    Args:
        group: the group.
        tensors: parameters and buffers by their first names.
        sigmas: scale of a batch norm -> its standard deviations, shape ``(features,)``; of the whole network.
        products: parameter -> mean over batches of ``|w dL/dw|``, in its shape; empty unless the criterion asks for it.
    """

    group: ChannelGroup
    tensors: Mapping[str, Tensor]
    sigmas: Mapping[str, Tensor]
    products: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, member: Member, tensor: Tensor | None = None) -> Tensor:
        """Entries of each channel in one member (or in another tensor of its shape), shape ``(size, n)``."""
        tensor = self.tensors[member.tensor] if tensor is None else tensor
        index = torch.from_numpy(member.index).to(tensor.device)
        return tensor.detach().movedim(member.dim, 0)[index].reshape(len(index), -1).double()

    @property
    def producers(self) -> list[Member]:
        """Members whose weights compute the channels: matrices and kernels, else whatever carries them."""
        return [m for m in self.carriers if self.tensors[m.tensor].ndim > 1] or self.carriers

    @property
    def carriers(self) -> list[Member]:
        """Members that are parameters and have the channels as outputs: weights, biases, scales of norms."""
        return [m for m in self.group.members if not m.reads and isinstance(self.tensors[m.tensor], nn.Parameter)]

    @property
    def readers(self) -> list[Member]:
        """Members whose weights take the channels as inputs."""
        return [m for m in self.group.members if m.reads]

    @property
    def norms(self) -> list[Member]:
        """Scales of the batch norms that carry the channels."""
        return [m for m in self.group.members if m.tensor in self.sigmas]


Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """How to score a group.

    Args:
        score: one group -> shape ``(size,)``, higher = keep.
        gradients: the mode the network is in while ``products`` are taken; None = not needed.
    """

    score: Callable[[Look], Tensor]
    gradients: Literal["train", "eval"] | None = None


def of_weights(look: Look, rows: Rows) -> Tensor:
    """A criterion of filters, summed over the producing layers."""
    return torch.stack([rows(look.rows(m)) for m in look.producers]).sum(dim=0)


def of_sensitivities(look: Look, rows: Rows) -> Tensor:
    """A criterion of the filters' ``|w dL/dw|``, summed over the producing layers."""
    return torch.stack([rows(look.rows(m, look.products[m.tensor])) for m in look.producers]).sum(dim=0)


def taylor(look: Look) -> Tensor:
    """``|w dL/dw|`` summed over weights, biases, and scales and shifts of norms that make the channel."""
    return torch.stack([l1(look.rows(m, look.products[m.tensor])) for m in look.carriers]).sum(dim=0)


def bn_scale(look: Look) -> Tensor:
    """``|gamma|``, summed over the batch norms; without one, the filter's norm relative to the group's mean.

    Raises:
        ValueError: the network has no batch norm.
    """
    if not look.sigmas:
        raise ValueError("bn_scale needs batch norms with a scale and this network has none; use l1, l2 or taylor")
    return _scale(look)


def _scale(look: Look) -> Tensor:
    if look.norms:
        return torch.stack([look.rows(m).abs().mean(dim=1) for m in look.norms]).sum(dim=0)
    norm = of_weights(look, l2)
    return norm / _positive(norm.mean())


def bn_dependency(look: Look) -> Tensor:
    """``|gamma_k| |W_next[:, k]|``, the norms summed over the readers (our instance of DAFP)."""
    read = [l2(look.rows(m)) for m in look.readers]
    return _scale(look) * (torch.stack(read).sum(dim=0) if read else 1.0)


def weight_dependency(look: Look) -> Tensor:
    """w_k of CPMC: mean ``|W[k]|`` plus mean ``|W_j[:, k]|`` of each reader j, each relative to its layer's mean.

    Our instance; the paper's formula could not be read. Layers weigh alike in it: what follows undoes the common factor
    of a layer's weights (a batch norm its scale, too, so that ``gamma / sigma`` says little of a channel).
    """
    sides = [look.rows(m).abs().mean(dim=1) for m in (*look.producers, *look.readers)]
    return torch.stack([side / _positive(side.mean()) for side in sides]).sum(dim=0)


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(partial(of_weights, rows=l1)),
    "l2": Criterion(partial(of_weights, rows=l2)),
    "fpgm": Criterion(partial(of_weights, rows=distances)),
    "bn_scale": Criterion(bn_scale),
    "taylor": Criterion(taylor, gradients="eval"),
    "snip_l1": Criterion(partial(of_sensitivities, rows=l1), gradients="train"),
    "snip_l2": Criterion(partial(of_sensitivities, rows=relative_l2), gradients="train"),
    "snip_max": Criterion(partial(of_sensitivities, rows=sensitivity), gradients="train"),
    "snip_fpgm": Criterion(partial(of_sensitivities, rows=directions), gradients="train"),
    "weight_l1": Criterion(partial(of_weights, rows=l1)),
    "weight_l2": Criterion(partial(of_weights, rows=relative_l2)),
    "weight_max": Criterion(partial(of_weights, rows=sensitivity)),
    "weight_fpgm": Criterion(partial(of_weights, rows=lambda rows: directions(rows.abs()))),
    "weight_dependency": Criterion(weight_dependency),
    "bn_dependency": Criterion(bn_dependency),
}
"""Name -> criterion; ``random`` is known besides."""


def channel_saliency(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str,
    seed: int = 0,
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    options: Mapping[str, float | str] | None = None,
) -> dict[str, FloatArray]:
    """Score of every channel.

    Args:
        model: the traced model, or another one of the same architecture; it is left as it was.
        graph: its channel groups.
        criterion: a name in ``CRITERIA``, or ``random``.
        seed: of the random criterion, and of dropout and the like while gradients are taken.
        batches: inputs and targets, on the model's device; for criteria of gradients.
        loss: outputs and targets -> scalar; for criteria of gradients.
        options: ``batches``, how many of them gradients are averaged over (default: all). ``images`` is for the caller,
            who makes the batches.

    Returns:
        Group name -> shape ``(size,)``, higher = keep.

    Raises:
        ValueError: the criterion or an option is unknown (lists the known ones), the network lacks what the criterion
            looks at, or there are no batches, or their gradients are not finite.
    """
    options = options or {}
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise ValueError(f"unknown options {unknown} of saliency {criterion!r}; known: {list(OPTIONS)}")
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return {group.name: rng.random(group.size) for group in graph.groups}
    if criterion not in CRITERIA:
        raise ValueError(f"unknown saliency criterion {criterion!r}; known: {sorted([*CRITERIA, 'random'])}")
    chosen, products = CRITERIA[criterion], {}
    if chosen.gradients:
        if batches is None or loss is None:
            raise ValueError(f"saliency {criterion!r} is computed from gradients: pass batches= and loss=")
        some = islice(batches, max(1, int(options["batches"])) if "batches" in options else None)
        products = _products(model, graph, some, loss, seed, training=chosen.gradients == "train")
    tensors, sigmas = tensors_of(model)[0], _sigmas(model)
    looks = (Look(group, tensors, sigmas, products) for group in graph.groups)
    return {look.group.name: chosen.score(look).cpu().numpy() for look in looks}


def _sigmas(model: nn.Module) -> dict[str, Tensor]:
    """Scale of each batch norm, by name -> the standard deviations it divides by, 1 where it keeps none."""
    names = {id(tensor): name for name, tensor in tensors_of(model)[0].items()}
    found = {}
    for module in model.modules():
        scale, variance = getattr(module, "weight", None), getattr(module, "running_var", None)
        if not isinstance(scale, Tensor) or id(scale) not in names:
            continue
        if isinstance(variance, Tensor):
            found[names[id(scale)]] = (variance.detach() + getattr(module, "eps", 0.0)).sqrt()
        elif isinstance(module, _BatchNorm):
            found[names[id(scale)]] = torch.ones_like(scale).detach()
    return found


def _products(
    model: nn.Module, graph: ChannelGraph, batches: Batches, loss: Loss, seed: int, *, training: bool
) -> dict[str, Tensor]:
    """Mean over batches of ``|w dL/dw|`` for every parameter that has channels of a group as outputs."""
    tensors = tensors_of(model)[0]
    names = dict.fromkeys(m.tensor for group in graph.groups for m in group.members if not m.reads)
    made = {name: p for name in names if isinstance(p := tensors[name], nn.Parameter) and p.is_floating_point()}
    sums, seen = {name: torch.zeros_like(p, requires_grad=False) for name, p in made.items()}, 0
    still = [p for p in made.values() if not p.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # running statistics, in training mode
    with undisturbed(model, training=training), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            for parameter in still:
                parameter.requires_grad_(True)
            for inputs, targets in batches:
                gradients = torch.autograd.grad(loss(model(inputs), targets), [*made.values()], allow_unused=True)
                for (name, parameter), gradient in zip(made.items(), gradients, strict=True):
                    if gradient is not None:
                        sums[name] += (parameter.detach() * gradient).abs()
                seen += 1
        finally:
            for parameter in still:
                parameter.requires_grad_(False)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    if not seen:
        raise ValueError("there are no batches to take gradients of; are there fewer training images than one batch?")
    wrong = [name for name, total in sums.items() if not torch.isfinite(total).all()]
    if wrong:
        raise ValueError(f"the loss has no finite gradient with respect to {wrong[:5]} ({len(wrong)} in all)")
    return {name: total / seen for name, total in sums.items()}


def uniform_plan(
    graph: ChannelGraph,
    keep_ratio: float,
    model: nn.Module | None = None,
    saliency: str = "l1",
    seed: int = 0,
) -> PruningPlan:
    """Keep the same share of every group: its ``max(1, round(keep_ratio * size))`` most salient channels.

    Args:
        graph: the traced network.
        keep_ratio: kept / width, in (0, 1].
        model: the traced model; needed unless the saliency is random.
        saliency: criterion of ``channel_saliency`` that needs no gradients.
        seed: of the random criterion.

    Raises:
        ValueError: the ratio is out of range, the criterion unknown, or the model missing.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")
    if model is None and saliency != "random":
        raise ValueError(f"saliency {saliency!r} is computed from weights: pass model=, or saliency='random'")
    scores = channel_saliency(model if model is not None else nn.Identity(), graph, saliency, seed)
    kept = {}
    for group in graph.groups:
        width = max(1, round(keep_ratio * group.size))
        kept[group.name] = sorted(np.argsort(-scores[group.name], kind="stable")[:width].tolist())
    return PruningPlan.full(graph.groups).replace(kept)
