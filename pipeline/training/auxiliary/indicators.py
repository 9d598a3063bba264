"""Indicators: a soft switch per channel, learned beside the weights and annealed to 0 or 1.

Guan, Liu, Liu, Xu, "DAIS: Automatic Channel Pruning via Differentiable Annealing Indicator Search" (arXiv 2011.02166)::

    I = sigmoid(alpha / T)                   one alpha per channel, T annealed from 1 to 1/50
    weights:     minimise the loss on 70 % of the training images, I fixed                           (SGD)
    indicators:  minimise loss + lasso * mean I + weight * |log(E cost / target)| on the other 30 %  (Adam)

First order: either step takes the other's variables as they are. The steps alternate in proportion to the images, so
that an epoch is one pass over all of them. The cost term is 0 while the expected cost is within a band around the
target. The expected cost is that of the soft widths (sum of I), MACs as the graph counts them; latency adds up what
each group saves, interpolated in its width. Where both have a target, the one that is further above counts. All alphas
begin at the one value at which the expected cost is the target (our choice).

Channels that several layers share have one alpha, so no term has to make coupled layers agree. An indicator multiplies
its channel where layers read it: the weights' input slices are scaled, which is the same for any traced network. Where
no weight reads a group, the parameters that carry it are scaled. At I in {0, 1} this is the masked network, but for
operators that mix channels without weights (a layer norm still sees what is switched off). The weights that come out
are those scaled by the final indicators: the network as it was trained.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.pipeline.training.auxiliary import Outcome, Task
from secateur.pipeline.training.checkpoints import UNUSABLE, save_checkpoint
from secateur.pipeline.training.curve import TrainingError
from secateur.pipeline.training.lesson import move
from secateur.pipeline.training.precision import trains_in_bf16
from secateur.pipeline.training.recipe import Schedule, optimizer_of
from secateur.pipeline.workloads import Split
from secateur.pruning.channels import ChannelGraph

Savings = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Group -> widths, increasing, and the share of the unpruned latency that each saves."""


LR, REACH, LARGEST_LR = 0.006, 10.0, 0.1


@dataclass(frozen=True)
class Settings:
    """Options of a ``AuxiliaryTraining`` request of this kind.

    Args:
        groups: JSON list of the groups that are learned about; empty = all. The others keep every channel.
        macs_ratio: target of the expected MACs, as a ratio to the unpruned network's; 0 = none.
        latency_ratio: target of the expected latency, likewise; 0 = none.
        savings: JSON of ``Savings``, for the expected latency.
        band: half the width of the band around the target, as a fraction of it, in 0..1.
        cost_weight: weight of ``|log(E cost / target)|``.
        lasso: weight of the mean indicator.
        lr: Adam's learning rate for alpha; 0 = ``LR``, or more where there are so few steps that alphas could not move
            by ``REACH`` in all (indicators would stay soft), at most ``LARGEST_LR``.
        weight_share: fraction in 0..1 of the training images that weights are trained on.
        coldest: the last temperature; the first is 1.
        annealing: ``exponential``, or ``harmonic``: 1 / T grows linearly.
    """

    groups: str = ""
    macs_ratio: float = 0.0
    latency_ratio: float = 0.0
    savings: str = "{}"
    band: float = 0.05
    cost_weight: float = 1.0
    lasso: float = 0.01
    lr: float = 0.0
    weight_share: float = 0.7
    coldest: float = 0.02
    annealing: str = "exponential"

    @classmethod
    def of(cls, options: Mapping[str, float | str]) -> Settings:
        """Settings from a request's options.

        Raises:
            ValueError: an option is unknown; lists the known ones.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"unknown options {unknown} of indicators; known: {', '.join(known)}")
        return cls(**options)  # type: ignore[arg-type]

    def temperature(self, done: float) -> float:
        """T when a share ``done`` (0..1) of the training is over."""
        if self.annealing == "harmonic":
            return 1 / (1 + (1 / self.coldest - 1) * done)
        return float(self.coldest**done)


class Indicators:
    """One alpha per channel of some groups, and where its indicator acts.

    Args:
        model: the traced network.
        graph: its channel groups.
        names: groups that are learned about; empty = all.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, names: Sequence[str] = ()) -> None:
        known = [group.name for group in graph.groups]
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"no channel groups {unknown}; the network has {known}")
        self.graph, compute = graph, next(model.parameters()).device
        self.groups = [group for group in graph.groups if not names or group.name in names]
        parameters = {name for name, _ in model.named_parameters()}
        slots: dict[tuple[str, int], Tensor] = {}
        self.places: dict[str, tuple[int, int]] = {}
        """Group -> its part of ``alpha``."""
        end = 0
        for group in self.groups:
            start, end = end, end + group.size
            self.places[group.name] = start, end
            carried = [m for m in group.members if m.tensor in parameters]
            for m in [m for m in carried if m.reads] or carried:
                slot = slots.setdefault((m.tensor, m.dim), torch.zeros(graph.shapes[m.tensor][m.dim], dtype=torch.long))
                slot[torch.from_numpy(m.index)] = torch.arange(start, end)[:, None] + 1
        self.alpha = nn.Parameter(torch.zeros(end, device=compute))
        self._slots: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        """Tensor -> dimension, and per position 1 + the channel's place in ``alpha``; 0 = no indicator."""
        for (tensor, dim), slot in slots.items():
            self._slots[tensor].append((dim, slot.to(compute)))
        per_width, constant = graph.lengths.per_width, graph.lengths.constant
        self._per_width = torch.from_numpy(per_width).double().to(compute)
        self._constant = torch.from_numpy(constant).double().to(compute)
        self._scale = torch.from_numpy(graph.macs.scale).double().to(compute) / graph.batch
        self._factors = torch.from_numpy(graph.macs.factors).to(compute)

    def soft(self, temperature: float) -> Tensor:
        """I = sigmoid(alpha / T), shape ``(channels,)``."""
        return torch.sigmoid(self.alpha / temperature)

    def scaled(self, model: nn.Module, indicators: Tensor) -> dict[str, Tensor]:
        """The parameters that indicators act on, scaled by them."""
        factors = torch.cat([indicators.new_ones(1), indicators])
        parameters, result = dict(model.named_parameters()), {}
        for name, dims in self._slots.items():
            weight: Tensor = parameters[name]
            for dim, slot in dims:
                weight = weight * factors[slot].view([-1 if d == dim else 1 for d in range(weight.ndim)])
            result[name] = weight
        return result

    def widths(self, indicators: Tensor) -> Tensor:
        """Expected width of every group of the graph, shape ``(groups,)``, float64."""
        soft = {name: indicators[start:end].double().sum() for name, (start, end) in self.places.items()}
        whole = {group.name: self._constant.new_tensor(group.size) for group in self.graph.groups}
        return torch.stack([soft.get(name, size) for name, size in whole.items()])

    def macs(self, indicators: Tensor) -> Tensor:
        """Expected MACs at batch 1: the products of lengths that ``secateur.pruning.cost`` evaluates, at soft
        widths."""
        lengths = self._constant + self._per_width @ self.widths(indicators)
        return (self._scale * lengths[self._factors].prod(dim=1)).sum()

    def latency(self, indicators: Tensor, savings: Savings) -> Tensor:
        """Expected latency, as a ratio to the unpruned network's."""
        total = indicators.new_ones((), dtype=torch.float64)
        for name, (widths, saved) in savings.items():
            start, end = self.places[name]
            total = total - interpolated(indicators[start:end].double().sum(), widths, saved)
        return total


def interpolated(x: Tensor, xs: Sequence[float], ys: Sequence[float]) -> Tensor:
    """Piecewise linear through (xs, ys), flat outside; differentiable in x, which has no dimensions."""
    after = min(max(sum(x.item() > at for at in xs), 1), len(xs) - 1)
    share = ((x - xs[after - 1]) / (xs[after] - xs[after - 1])).clamp(0, 1)
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


class CostTerm:
    """``|log(E cost / target)|`` outside a band around the target, of the cost furthest above its own."""

    def __init__(self, indicators: Indicators, settings: Settings) -> None:
        self.indicators, self.settings = indicators, settings
        self.savings: Savings = json.loads(settings.savings)
        with torch.no_grad():
            self.whole = indicators.macs(torch.ones_like(indicators.alpha))

    def excess(self, soft: Tensor) -> Tensor:
        """log(E cost / target); 0 without a target."""
        logs = [soft.new_zeros((), dtype=torch.float64)]
        if self.settings.macs_ratio:
            logs.append(torch.log(self.indicators.macs(soft) / (self.settings.macs_ratio * self.whole)))
        if self.settings.latency_ratio:
            latency = self.indicators.latency(soft, self.savings).clamp_min(1e-6)
            logs.append(torch.log(latency / self.settings.latency_ratio))
        return torch.stack(logs[1:] or logs).max()

    def start(self) -> None:
        """Set all alphas to the value at which the expected cost is the target (0 without one), at T = 1.

        From anywhere else the cost term would move all channels alike before the loss had told them apart.
        """
        low, high = -10.0, 10.0
        with torch.no_grad():
            for _ in range(40 if self.settings.macs_ratio or self.settings.latency_ratio else 0):
                middle = (low + high) / 2
                above = float(self.excess(torch.sigmoid(torch.full_like(self.indicators.alpha, middle)))) > 0
                low, high = (low, middle) if above else (middle, high)
            self.indicators.alpha.fill_((low + high) / 2)

    def __call__(self, soft: Tensor) -> Tensor:
        excess = self.excess(soft)
        low, high = 1 - self.settings.band, 1 + self.settings.band
        return excess.abs() if not low <= float(excess.detach().exp()) <= high else 0 * excess


def train(task: Task) -> Outcome:
    """Train weights and indicators in turn; ``scores`` are the final indicators, in 0..1.

    Raises:
        ValueError: an option or a group is unknown.
        TrainingError: the loss became NaN or infinite.
    """
    settings = Settings.of(task.options)
    model = move(task.model, task.compute)
    indicators = Indicators(model, task.graph, json.loads(settings.groups or "[]"))
    images = _train(task, settings, model, indicators)
    with torch.no_grad():
        final = indicators.soft(settings.coldest)
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        scaled = indicators.scaled(model, final)
        state |= {alias: scaled[name] for alias, name in task.graph.aliases.items() if name in scaled} | scaled
    scores = {group.name: torch.ones(group.size, dtype=torch.float64).numpy() for group in task.graph.groups}
    hard = torch.sigmoid(indicators.alpha.detach().double() / settings.coldest).cpu()
    scores |= {name: hard[start:end].numpy() for name, (start, end) in indicators.places.items()}
    return Outcome(state, scores, images)


def _train(task: Task, settings: Settings, model: nn.Module, indicators: Indicators) -> int:
    """The bilevel loop; returns how many images were passed forward and backward."""
    recipe, workload, alpha, compute = task.recipe, task.workload, indicators.alpha, task.compute
    weights = optimizer_of(model, recipe)
    cost = CostTerm(indicators, settings)
    cost.start()
    halves = _halves(task, settings.weight_share)
    batches = [_num_batches(half, recipe.batch_size) for half in halves]
    per_epoch = sum(batches)
    schedule = Schedule(recipe, per_epoch)
    steps = schedule.steps
    least = min(LARGEST_LR, REACH / max(1.0, recipe.epochs * batches[1]))
    switches = torch.optim.Adam([alpha], lr=settings.lr or max(LR, least))
    everything = {"model": model, "weights": weights, "switches": switches}
    step, images = _resume(task.checkpoint, everything, alpha, compute)
    bf16 = trains_in_bf16(recipe.autocast, compute)
    model.train()
    while step < steps:
        epoch = step // per_epoch
        generator = torch.Generator().manual_seed(task.seed * 100_003 + epoch)
        torch.manual_seed(task.seed * 100_003 + epoch)  # dropout inside the model
        for is_weights, split, chosen in _interleaved(halves, recipe.batch_size, generator):
            if step >= steps:
                break
            x, targets = workload.batch(split, chosen, train=True, generator=generator, device=compute)
            soft = indicators.soft(settings.temperature(step / steps))
            soft = soft.detach() if is_weights else soft
            with torch.autocast(compute.type, torch.bfloat16, enabled=bf16):
                outputs = functional_call(model, indicators.scaled(model, soft), (x,))
                loss = workload.loss(outputs, targets, recipe.label_smoothing)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the training loss is {loss.item()} at step {step} of {steps}; "
                    f"lower lr (now {recipe.lr}) or set clip_norm: 1.0 in the recipe"
                )
            if is_weights:
                schedule.set(weights, step)
                weights.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                weights.step()
            else:
                loss = loss + settings.lasso * soft.mean() + settings.cost_weight * cost(soft)
                (alpha.grad,) = torch.autograd.grad(loss, alpha)
                switches.step()
            step, images = step + 1, images + len(chosen)
            task.report(step, steps, f"loss {loss.item():.3f}")
        if step < steps:
            _save(task.checkpoint, everything, alpha, step, images)
    task.checkpoint.unlink(missing_ok=True)
    model.eval()
    return images


def _halves(task: Task, share: float) -> tuple[Split, Split]:
    """The training images for weights and those for indicators: disjoint, at random under the seed."""
    train = task.workload.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(task.seed)).numpy()
    at = min(max(1, round(share * len(train))), len(train) - 1)
    return Split(train.source, train.indices[order[:at]]), Split(train.source, train.indices[order[at:]])


def _num_batches(split: Split, batch_size: int) -> int:
    return math.ceil(len(split) / batch_size)


def _interleaved(
    halves: tuple[Split, Split], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[bool, Split, Tensor]]:
    """One epoch: (whether weights learn, split, indices within it), either kind of batch evenly spread."""
    batches = []
    for is_weights, split in zip((True, False), halves, strict=True):
        parts = torch.tensor_split(torch.randperm(len(split), generator=generator), _num_batches(split, batch_size))
        batches += [((i + 0.5) / len(parts), is_weights, split, part) for i, part in enumerate(parts)]
    for _, is_weights, split, part in sorted(batches, key=lambda batch: (batch[0], not batch[1])):
        yield is_weights, split, part


def _save(path: Path, everything: Mapping[str, Any], alpha: Tensor, step: int, images: int) -> None:
    state = {name: thing.state_dict() for name, thing in everything.items()}
    save_checkpoint(path, {**state, "alpha": alpha.detach(), "step": step, "images": images})


def _resume(path: Path, everything: Mapping[str, Any], alpha: Tensor, compute: torch.device) -> tuple[int, int]:
    """Step to continue at, and images seen; zeros where there is no usable checkpoint."""
    if not path.exists():
        return 0, 0
    try:
        state = torch.load(path, map_location=compute, weights_only=True)
        for name, thing in everything.items():
            thing.load_state_dict(state[name])
        with torch.no_grad():
            alpha.copy_(state["alpha"])
        return int(state["step"]), int(state["images"])
    except UNUSABLE:
        return 0, 0  # cut short or of another network: begin again
