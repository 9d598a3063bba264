"""The dense network with channels masked: what a pruned network has to compute.

Removed channels are masked by zeros in the weights that make and read them. An operator that mixes channels without
weights (a layer norm, a softmax, a product of two activations) would still see them, so it runs on the kept ones only:
its arguments are cut, and its result is put back with zeros elsewhere. Numbers that the code computes from widths (the
scale of an attention, ``(dim // heads) ** -0.5``) are taken as the pruned network computes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.channels import ChannelGraph
from pruning.plan import PruningPlan
from pruning.rules import Propagation, tensors_in
from pruning.tracer import CallKey, Calls, modules_entered, tensors_of, undisturbed

ARITHMETIC = frozenset(
    """
    mul mul_ multiply div div_ divide true_divide add add_ sub sub_ rsub pow pow_ tensor
    scaled_dot_product_attention __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __div__ __rdiv__ __itruediv__
    __idiv__ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __pow__ __rpow__ __ipow__
""".split()
)
"""Torch functions that compute with the numbers they are given."""

Numbers = dict[CallKey, tuple[float, ...]]
"""Numbers given to the calls of ``ARITHMETIC``."""


def run_pruned(pruned: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Numbers]:
    """The output of a pruned model in eval mode, and the numbers its code computed with. It is left as it was."""
    with undisturbed(pruned), modules_entered(pruned) as entered, Arithmetic(Calls(entered)) as seen:
        return pruned(*args, **kwargs), seen.numbers


def run_masked(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    numbers: Numbers | None = None,
) -> Any:
    """The output of the dense model whose removed channels are masked, in eval mode. The model is left as it was.

    Args:
        model: the traced model.
        graph: its channel groups.
        plan: what is kept.
        args, kwargs: the input.
        numbers: what the pruned network computes with, where its code computes numbers from widths.
    """
    masked = masked_tensors(model, graph, plan)
    reference = _Reference(model, graph, plan, masked) if graph.mixed else nullcontext()
    with undisturbed(model), modules_entered(model) as entered, Arithmetic(Calls(entered), numbers), reference:
        return functional_call(model, masked, tuple(args), dict(kwargs))


def masked_tensors(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """Parameters of the dense model that lose entries, zero at the removed positions."""
    tensors = tensors_of(model)[0]
    masked = {}
    for name, dims in graph.slices(plan).items():
        tensor = tensors.get(name)
        if not isinstance(tensor, nn.Parameter):
            continue
        masked[name] = tensor.detach().clone()
        for dim, kept in dims.items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            gone[torch.from_numpy(kept)] = False
            masked[name].index_fill_(dim, gone.nonzero()[:, 0], 0)
    return masked


class Arithmetic(TorchFunctionMode):
    """Keeps the numbers given to calls, or gives calls the numbers kept from another run."""

    def __init__(self, calls: Calls, given: Numbers | None = None) -> None:
        super().__init__()
        self.calls, self.given = calls, given
        self.numbers: Numbers = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in ARITHMETIC:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            kwargs = {**kwargs, "scale": query.shape[-1] ** -0.5}
        key = self.calls.key(func.__name__)
        own = tuple(v for v in (*args, *kwargs.values()) if _is_number(v))
        self.numbers[key] = own
        new = (self.given or {}).get(key, own)
        if new != own and len(new) == len(own):
            values = iter(new)
            args = [next(values) if _is_number(v) else v for v in args]
            kwargs = {k: next(values) if _is_number(v) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Reference(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, graph: ChannelGraph, plan: PruningPlan, masked: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = Propagation(graph.rules)
        slices = graph.slices(plan)
        removed = []
        for name, tensor in tensors_of(model)[0].items():
            labels = self.labels.register(name, masked.get(name, tensor))
            for d, kept in slices.get(name, {}).items():
                dim = labels[d]
                assert dim is not None
                removed.append(np.delete(dim, kept))
        self.gone = np.zeros(self.labels.num_labels, dtype=bool)
        self.gone[np.concatenate(removed) if removed else []] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        seen = len(self.labels.mixed)
        arguments = self.labels.call(func, args, kwargs or {}, out)
        if any(self._loses(labels) for labels in self.labels.mixed[seen:]):
            results = list(tensors_in([func(**self._cut(arguments))]))
            for result, tensor in zip(results, tensors_in([out]), strict=True):
                tensor.zero_()
                self._kept_part(tensor, result)
        return out

    def _loses(self, labels: Any) -> bool:
        """Whether some of these labels are removed; labels made after the parameters' never are."""
        return bool(self.gone[labels[labels < len(self.gone)]].any())

    def _kept(self, tensor: Tensor) -> list[tuple[int, Tensor]]:
        """Dimensions of a tensor that lose entries, and the positions they keep."""
        found = []
        for d, labels in enumerate(self.labels.of(tensor)):
            if labels is not None and self._loses(labels):
                known = labels < len(self.gone)
                keep = ~known
                keep[known] = ~self.gone[labels[known]]
                found.append((d, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device)))
        return found

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

    def _kept_part(self, tensor: Tensor, values: Tensor) -> None:
        """Write values into the kept positions of a tensor."""
        positions = dict(self._kept(tensor))
        if not positions:
            tensor.copy_(values)
            return
        index = [positions.get(d, torch.arange(n, device=tensor.device)) for d, n in enumerate(tensor.shape)]
        tensor.index_put_(torch.meshgrid(*index, indexing="ij"), values.to(tensor.dtype))
