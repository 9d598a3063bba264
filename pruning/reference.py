"""The dense network with channels masked: what a pruned network has to compute.

Removed channels are masked by zeros in the weights that make and read them. An operator that mixes channels without
weights (a layer norm, a softmax, a product of two activations) would still see them, so it runs on the kept ones only:
its arguments are cut, and its result is put back with zeros elsewhere. Numbers that the code computes from widths (the
scale of an attention, ``(dim // heads) ** -0.5``) are taken as the pruned network computes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.modes import Watcher
from secateur.pruning.plan import IntArray, PruningPlan
from secateur.pruning.rules import ATTENTIONS, TensorMap, operator_of, propagation, tensors_in
from secateur.pruning.snapshot import Snapshot
from secateur.pruning.tracer import Entered, Told, modules_entered, tensors_of, undisturbed

Numbers = dict[tuple[str, str], list[tuple[float, ...]]]
"""Numbers given to the operators of a module: running module and operator -> one entry per call."""


def run_pruned(pruned: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Numbers]:
    """The output of a pruned model in eval mode, and the numbers its code computed with. It is left as it was."""
    with (
        undisturbed(pruned, watched=True),
        modules_entered(pruned) as entered,
        Arithmetic(entered) as seen,
        Scales(seen),
    ):
        return pruned(*args, **kwargs), seen.numbers


def run_masked(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    numbers: Numbers | None = None,
    before: Snapshot | None = None,
) -> Any:
    """The output of the dense model whose removed channels are masked, in eval mode. The model is left as it was.

    Weights are masked when an operator reads them, so that no second set of them is in memory.

    Args:
        model: the traced model.
        graph: its channel groups.
        plan: what is kept.
        args, kwargs: the input.
        numbers: what the pruned network computes with, where its code computes numbers from widths.
        before: what the model holds, if that is known.
    """
    with undisturbed(model, before=before, watched=True), modules_entered(model) as entered:
        reference = _Reference(entered, model, graph, plan, numbers or {})
        with reference, Told(reference.labels), Scales(reference):
            return model(*args, **kwargs)


def masked_tensors(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """Parameters of the dense model that lose entries, zero at the removed positions."""
    tensors = tensors_of(model)[0]
    return {
        name: _masked(tensors[name], dims)
        for name, dims in graph.slices(plan).items()
        if isinstance(tensors.get(name), nn.Parameter)
    }


def _masked(tensor: Tensor, kept: Mapping[int, IntArray]) -> Tensor:
    """A copy that is zero at all positions but the kept ones."""
    stays = torch.ones((1,) * tensor.ndim, dtype=torch.bool, device=tensor.device)
    for dim, positions in kept.items():
        along = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        along[torch.from_numpy(positions)] = True
        stays = stays & along.view([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return torch.where(stays, tensor.detach(), 0)


class Arithmetic(Watcher):
    """Keeps the numbers that operators are given."""

    def __init__(self, entered: Entered) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entered = entered
        self.numbers: Numbers = defaultdict(list)
        self.made: TensorMap[bool] = TensorMap()

    def scale(self, own: float) -> float:
        """Keep the scale of an attention."""
        self.numbers[self.entered.stack[-1], "scale"].append((own,))
        return own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_arithmetic(func):
            self.numbers[self.entered.stack[-1], operator_of(func).name].append(_numbers_in(func, args, self.made))
        out = func(*args, **(kwargs or {}))
        _note_scalars(out, self.made)
        return out


class Scales(TorchFunctionMode):
    """Keeps the scales of attentions, or gives those of the pruned network: kernels hide them, each in its way.

    The rules of the masked network are told which torch function runs, as those of the traced one were.
    """

    def __init__(self, run: Arithmetic | _Reference) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            kwargs = {**kwargs, "scale": self.run.scale(query.shape[-1] ** -0.5)}
        if not isinstance(self.run, _Reference) or func.__name__ == "__get__":
            return func(*args, **kwargs)
        labels = self.run.labels
        labels.enter(func.__name__, args)
        try:
            return func(*args, **kwargs)
        finally:
            labels.enter("", ())


@cache
def is_arithmetic(func: Any) -> bool:
    """Whether an operator may compute with numbers: elementwise ones, and ``lift_fresh`` (``torch.tensor(3.0)``)."""
    return torch.Tag.pointwise in func.tags or operator_of(func).name == "lift_fresh"


def _note_scalars(out: Any, made: TensorMap[bool]) -> None:
    """Remember tensors without dimensions that an operator made; all others are numbers that torch has wrapped."""
    for tensor in tensors_in((out,)):
        if tensor.ndim == 0:
            made[tensor] = True


def _numbers_in(func: Any, args: Sequence[Any], made: TensorMap[bool]) -> tuple[float, ...]:
    if operator_of(func).name == "lift_fresh":
        constant = args[0]
        is_number = constant.numel() == 1 and constant.device.type != "meta" and not constant.is_complex()
        return (float(constant),) if is_number else ()
    return tuple(float(v) for v in args if _is_number(v, made))


def _is_number(value: Any, made: TensorMap[bool]) -> bool:
    if isinstance(value, Tensor):
        is_wrapped = value.ndim == 0 and type(value) is Tensor and made.get(value) is None
        return is_wrapped and value.device.type == "cpu" and value.is_floating_point()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _on_kept(func: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """What an operator gives for arguments that are cut to the kept channels.

    Attention kernels have conditions of their own, such as equal head sizes of queries, keys and values, which the kept
    channels need not meet: the result, without what a kernel adds for its backward pass, is that of the formula.
    """
    if operator_of(func).name not in ATTENTIONS:
        return tensors_in((func(**arguments),))
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    mask = arguments.get("attn_mask")
    mask = arguments.get("attn_bias") if mask is None else mask
    shared = query.shape[1] // key.shape[1]  # heads of queries to one of keys
    key, value = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (key, value))
    scale = arguments.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if arguments.get("is_causal"):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=scores.device).tril() == 0, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return [torch.softmax(scores, -1) @ value]


class _Reference(Watcher):
    def __init__(
        self, entered: Entered, model: nn.Module, graph: ChannelGraph, plan: PruningPlan, numbers: Numbers
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entered, self.numbers, self.mixed = entered, numbers, graph.mixed
        self.seen: dict[tuple[str, str], int] = defaultdict(int)
        self.made: TensorMap[bool] = TensorMap()
        for buffer in model.buffers():
            _note_scalars(buffer, self.made)
        self.labels = propagation(graph.rules)
        self.slices: TensorMap[Mapping[int, IntArray]] = TensorMap()
        self.positions: dict[int, tuple[Tensor | None, IntArray]] = {}
        slices = graph.slices(plan)
        removed = []
        for name, tensor in tensors_of(model)[0].items():
            labels = self.labels.register(name, tensor)
            for d, kept in slices.get(name, {}).items():
                dim = labels[d]
                assert dim is not None
                removed.append(np.delete(dim, kept))
            if name in slices and isinstance(tensor, nn.Parameter):
                self.slices[tensor] = slices[name]
        self.gone = np.zeros(self.labels.num_labels + 1, dtype=bool)  # the last one stands for labels made later
        self.gone[np.concatenate(removed) if removed else []] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args = self._as_pruned(func, args)
        real = [self._mask(v) for v in args]
        out = func(*real, **{name: self._mask(v) for name, v in kwargs.items()})
        if real and out is real[0]:
            out = args[0]
        _note_scalars(out, self.made)
        if not self.mixed:  # masked weights say it all, labels are not needed
            return out
        seen = len(self.labels.mixed)
        self.labels.where = self.entered.stack[-1]
        arguments = self.labels.call(func, args, kwargs, out)
        if any(self._loses(labels) for labels in self.labels.mixed[seen:]):
            results = _on_kept(func, self._cut(arguments))
            for result, tensor in zip(results, tensors_in((out,)), strict=False):
                tensor.copy_(self._put_back(result, tensor))
        return out

    def _as_pruned(self, func: Any, args: Any) -> Any:
        """The arguments, with the numbers that the pruned network gave in the same place."""
        if not is_arithmetic(func):
            return args
        key = (self.entered.stack[-1], operator_of(func).name)
        given, own = self.numbers.get(key, []), _numbers_in(func, args, self.made)
        place = self.seen[key]
        self.seen[key] += 1
        if place >= len(given) or given[place] == own or len(given[place]) != len(own):
            return args
        if operator_of(func).name == "lift_fresh":
            return (torch.full_like(args[0], given[place][0]),)
        values = iter(given[place])
        return tuple(self._number_like(v, values) if _is_number(v, self.made) else v for v in args)

    @staticmethod
    def _number_like(old: Any, values: Iterator[float]) -> Any:
        return torch.full_like(old, next(values)) if isinstance(old, Tensor) else next(values)

    def scale(self, own: float) -> float:
        """The scale that the pruned network's attention has in the same place."""
        key = (self.entered.stack[-1], "scale")
        given, place = self.numbers.get(key, []), self.seen[key]
        self.seen[key] += 1
        return given[place][0] if place < len(given) else own

    def _mask(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._mask, value))
        kept = self.slices.get(value) if isinstance(value, Tensor) else None
        return value if kept is None else _masked(value, kept)

    def _loses(self, labels: IntArray) -> bool:
        """Whether some of these labels are removed; labels made after the parameters' never are."""
        return self._positions(labels) is not None

    def _positions(self, labels: IntArray) -> Tensor | None:
        """Positions that are kept, or None if all are."""
        if id(labels) not in self.positions:
            gone = self.gone[np.minimum(labels, len(self.gone) - 1)]
            kept = torch.from_numpy(np.flatnonzero(~gone)) if gone.any() else None
            self.positions[id(labels)] = kept, labels  # the array is kept, so that no other gets its id
        return self.positions[id(labels)][0]

    def _kept(self, tensor: Tensor) -> list[tuple[int, Tensor]]:
        """Dimensions of a tensor that lose entries, and the positions they keep."""
        found = [(d, self._positions(labels)) for d, labels in enumerate(self.labels.of(tensor)) if labels is not None]
        return [(d, positions.to(tensor.device)) for d, positions in found if positions is not None]

    def _cut(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        cut = {name: self._cut_tensor(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        if "normalized_shape" in cut:
            cut["normalized_shape"] = list(cut["input"].shape[-len(cut["normalized_shape"]) :])
        if {"C", "HxW", "group"} <= cut.keys():
            if cut["group"] == cut["C"]:
                cut["group"] = cut["input"].shape[1]
            cut["C"] = cut["input"].shape[1]
        return cut

    def _cut_tensor(self, tensor: Tensor) -> Tensor:
        result = tensor
        for d, positions in self._kept(tensor):
            result = result.index_select(d, positions)
        return result

    def _put_back(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Values of the kept positions of a tensor, with zeros at the others."""
        for d, positions in self._kept(tensor):
            full = values.new_zeros(*values.shape[:d], tensor.shape[d], *values.shape[d + 1 :])
            values = full.index_copy_(d, positions, values)
        return values
