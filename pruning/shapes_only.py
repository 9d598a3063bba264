"""Operators answered by the shape of their result: what a run costs that looks at no values.

Heavy operators give zeros. So do light ones of tensors that are such zeros already, where shape and layout of the
result are certain; everything else is computed as usual. Large zeros are memory that nobody has touched: they cost as
much as small ones until somebody reads them.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_map_only

from secateur.pruning.modes import Watcher
from secateur.pruning.rules import TensorMap, operator_of, tensors_in


class NeedsValuesError(Exception):
    """A run without arithmetic met an operator that looks at values."""


HEAVY = frozenset(
    "convolution addmm mm bmm baddbmm linear _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention".split()
)
"""Operators that take nearly all of a forward pass."""

PRODUCTS = frozenset(("addmm", "mm", "bmm", "baddbmm"))
"""Heavy operators whose shapes are quickly told."""

LOOKING = frozenset("torchvision::nms torchvision::roi_align torchvision::roi_pool torchvision::ps_roi_align".split())
"""Operators of other libraries that look at values, or follow those that do."""

LARGE = 1 << 15
"""Entries of a tensor from which on computing takes longer than telling the shape."""


class ShapesOnly:
    """Answers the operators of one run."""

    def __init__(self) -> None:
        self._zeros: TensorMap[bool] = TensorMap()
        """Large tensors that are zeros in place of values."""

    def answer(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output of an operator, or zeros in its shape.

        Raises:
            NeedsValuesError: the operator looks at values.
        """
        name = operator_of(func).name
        if name in HEAVY:
            out = _heavy(name, func, args, kwargs)
            self._mark(out)
            return out
        if _looks(func) and (name != "index" or any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))):
            raise NeedsValuesError(name)
        if not any(t.numel() >= LARGE and self._zeros.get(t) for t in tensors_in(args)):
            return func(*args, **kwargs)
        out = _light(name, func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        self._mark(out)
        return out

    def _mark(self, out: Any) -> None:
        for tensor in tensors_in((out,)):
            if tensor.numel() >= LARGE:
                self._zeros[tensor] = True


class NoArithmetic(Watcher):
    """Runs a model for its shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes = ShapesOnly()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.shapes.answer(func, args, kwargs or {})


def untouched(shape: Sequence[int], like: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """Zeros of the type and device of another tensor; large ones on the CPU are memory that nobody has touched.

    Args:
        strides: how they lie in memory, without gaps; None = in order.
    """
    size = prod(shape)
    if size >= LARGE and like.device.type == "cpu":
        memory = torch.frombuffer(mmap.mmap(-1, size * like.element_size()), dtype=like.dtype).untyped_storage()
        made = torch.empty(0, dtype=like.dtype)
        return made.set_(memory, 0, shape) if strides is None else made.set_(memory, 0, shape, strides)  # type: ignore[call-overload]
    if strides is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device).zero_()


@cache
def _looks(func: Any) -> bool:
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return operator_of(func).name in LOOKING or not tags.isdisjoint(func.tags)


def _heavy(name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if name in PRODUCTS and not kwargs:
        return _product(args[-2], args[-1], args[0] if len(args) == 3 else None)
    if name == "convolution" and not kwargs and args[0].ndim == args[1].ndim:
        return _convolution(*args)
    first = tensors_in(args)[0]
    args, kwargs = tree_map_only(Tensor, _on_meta, (tuple(args), dict(kwargs)))
    return tree_map_only(Tensor, lambda t: _real(t, first.device), func(*args, **kwargs))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """Zeros for a tensor on the meta device."""
    return untouched(tensor.shape, torch.empty(0, dtype=tensor.dtype, device=device), tensor.stride())


def _product(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Zeros in the shape of a matrix product, shapes ``(..., m, k)`` and ``(..., k, n)``, plus a broadcast bias."""
    if x.shape[-1] != y.shape[-2] or x.shape[:-2] != y.shape[:-2]:
        raise RuntimeError(f"matrices of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be multiplied")
    if bias is not None and bias.ndim and bias.shape[-1] not in (1, y.shape[-1]):
        raise RuntimeError(f"a bias of shape {tuple(bias.shape)} cannot be added to {y.shape[-1]} columns")
    return untouched((*x.shape[:-1], y.shape[-1]), x)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Zeros in the shape of a convolution, ``x`` of shape ``(batch, in, ...)``."""
    first, second = weight.shape[:2]
    inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
    if x.shape[1] != inputs or outputs % groups or (bias is not None and bias.shape != (outputs,)):
        raise RuntimeError(
            f"convolution with {groups} groups and weight {tuple(weight.shape)}: input has {x.shape[1]} channels"
        )
    space = []
    for i, (n, k) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        s, p, d, extra = (v[i] if len(v) > 1 else v[0] for v in (stride, padding, dilation, output_padding))
        reach = d * (k - 1) + 1
        space.append((n - 1) * s - 2 * p + reach + extra if transposed else (n + 2 * p - reach) // s + 1)
    if min(space) < 1:
        raise RuntimeError(f"convolution: an input of {tuple(x.shape[2:])} is smaller than the kernel")
    shape = (x.shape[0], outputs, *space)
    if x.is_contiguous() and weight.is_contiguous():
        return untouched(shape, x)
    contiguous = torch.contiguous_format
    formats = {suggest_memory_format(x), suggest_memory_format(weight)} - {contiguous}
    layout = next(iter(formats), contiguous)
    return untouched(shape, x, torch.empty(shape, device="meta", memory_format=layout).stride())


def _light(name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a light operator gives, in zeros; None where shape and layout are not certain."""
    if (told := TOLD.get(name)) is None or not kwargs.keys() <= {"alpha", "approximate", "memory_format"}:
        return None
    tensors = tensors_in(args)
    first = tensors[0]
    if first.dtype not in (torch.float32, torch.float64) or any(t.device != first.device for t in tensors):
        return None
    return told(operator_of(func).bind(args, kwargs), func)


def _has(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether a tensor has these dimensions, each named once."""
    return all(-x.ndim <= d < x.ndim for d in dims) and len({d % x.ndim for d in dims}) == len(dims)


def _elementwise(a: Mapping[str, Any], func: Any) -> Any:
    """Numbers, and tensors that are broadcast to the shape of one of them."""
    tensors = tensors_in(a.values())
    whole = max(tensors, key=lambda t: (t.ndim, t.numel()))
    is_mixed = any(t.dtype not in (whole.dtype, torch.bool) for t in tensors) or whole.dtype is torch.bool
    if is_mixed or not _fit(tensors, whole) or any(isinstance(v, complex) for v in a.values()):
        return None
    if operator_of(func).writes:
        return tensors[0] if tensors[0].shape == whole.shape and 0 not in tensors[0].stride() else None
    return _in_order(tensors, whole)


def _fit(tensors: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether all tensors are broadcast to the shape of one of them."""
    shapes = [t.shape for t in tensors if t is not whole]
    return all(
        len(s) <= whole.ndim and all(n in (1, m) for n, m in zip(reversed(s), reversed(whole.shape), strict=False))
        for s in shapes
    )


def _in_order(tensors: Sequence[Tensor], whole: Tensor) -> Tensor | None:
    """Zeros like one tensor, where all lie in order in memory, so that the result does."""
    if not all(t.is_contiguous() for t in tensors):
        return None
    if any(t.shape != whole.shape for t in tensors) and 1 in whole.shape[1:]:
        return None
    return untouched(whole.shape, whole)


def _batch_norm(a: Mapping[str, Any], func: Any) -> Any:
    x = a["input"]
    own = [a.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if a["training"] or not x.is_contiguous() or x.ndim < 2:
        return None
    if any(t is None or t.shape != x.shape[1:2] or t.dtype != x.dtype for t in own):
        return None
    return untouched(x.shape, x), x.new_empty(0), x.new_empty(0)


def _layer_norm(a: Mapping[str, Any], func: Any) -> Any:
    x, own = a["input"], list(a["normalized_shape"])
    affine = [t for t in (a["weight"], a["bias"]) if t is not None]
    if list(x.shape[x.ndim - len(own) :]) != own or any(list(t.shape) != own for t in affine) or not x.is_contiguous():
        return None
    rows = (*x.shape[: x.ndim - len(own)], *(1 for _ in own))
    return untouched(x.shape, x), x.new_zeros(rows), x.new_zeros(rows)


def _softmax(a: Mapping[str, Any], func: Any) -> Any:
    x = a["self"]
    return untouched(x.shape, x) if x.is_contiguous() and not a["half_to_float"] and _has(x, [a["dim"]]) else None


def _cat(a: Mapping[str, Any], func: Any) -> Any:
    parts = a["tensors"]
    first = parts[0]
    if not _has(first, [a["dim"]]):
        return None
    d = a["dim"] % first.ndim
    rests = {(t.ndim, t.shape[:d], t.shape[d + 1 :], t.dtype, t.is_contiguous()) for t in parts}
    if rests != {(first.ndim, first.shape[:d], first.shape[d + 1 :], first.dtype, True)}:
        return None
    return untouched((*first.shape[:d], sum(t.shape[d] for t in parts), *first.shape[d + 1 :]), first)


def _copy(a: Mapping[str, Any], func: Any) -> Any:
    x, layout = a["self"], a.get("memory_format")
    if layout == torch.contiguous_format or (x.is_contiguous() and layout in (None, torch.preserve_format)):
        return untouched(x.shape, x)
    return None


def _roll(a: Mapping[str, Any], func: Any) -> Any:
    x, dims = a["self"], a["dims"] or ()
    return untouched(x.shape, x) if x.is_contiguous() and _has(x, dims) and len(dims) == len(a["shifts"]) else None


def _pad(a: Mapping[str, Any], func: Any) -> Any:
    x, amounts = a["self"], a["pad"]
    if not x.is_contiguous() or min(amounts) < 0 or len(amounts) > 2 * x.ndim or len(amounts) % 2:
        return None
    added = [0] * (x.ndim - len(amounts) // 2) + [sum(amounts[i : i + 2]) for i in range(len(amounts) - 2, -1, -2)]
    return untouched([n + more for n, more in zip(x.shape, added, strict=True)], x)


def _resized(a: Mapping[str, Any], func: Any) -> Any:
    """Pooled or interpolated to a stated size."""
    x, size = a["self"] if "self" in a else a["input"], a["output_size"]
    if not x.is_contiguous() or not size or min(size) < 1 or x.ndim != len(size) + 2:
        return None
    return untouched((*x.shape[:2], *size), x)


def _mean(a: Mapping[str, Any], func: Any) -> Any:
    x, dims = a["self"], a.get("dim")
    if not x.is_contiguous() or not dims or not _has(x, dims) or a.get("dtype") is not None or 1 in x.shape[1:]:
        return None
    over = {d % x.ndim for d in dims}
    kept = [1 if d in over else n for d, n in enumerate(x.shape) if d not in over or a["keepdim"]]
    return x.new_zeros(kept)


_ELEMENTWISE = (
    "relu gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu mish softplus exp abs neg sqrt rsqrt "
    "erf square reciprocal clamp clamp_min clamp_max pow mul add sub div masked_fill"
)
_RESIZED = "_adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"
TOLD: dict[str, Callable[[Mapping[str, Any], Any], Any]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(_RESIZED.split(), _resized),
    **dict.fromkeys(("mean", "sum"), _mean),
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "clone": _copy,
    "roll": _roll,
    "cat": _cat,
    "constant_pad_nd": _pad,
}
"""Light operator -> zeros in the shape of its result, from its arguments by name; None = it has to be asked."""
