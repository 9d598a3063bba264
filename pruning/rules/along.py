"""Rules of operators that work along dimensions: norms, reductions, pooling, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.pruning.rules.labels import BINS, Propagation, as_list
from secateur.pruning.rules.operators import Arguments, tensors_in


def along(p: Propagation, a: Arguments, out: Any, *, normalises: bool = False) -> None:
    """Work along one or more dimensions (``dim`` / ``dims``) of ``self``; the result has the same shape or a part."""
    dims = list(p.of(a["self"]))
    chosen = a["dims"] if "dims" in a else a.get("dim")
    for d in range(len(dims)) if chosen is None else as_list(chosen):
        if normalises:
            p.normalise(dims[d])
        else:
            p.freeze(dims[d], f"{p.here} works along it")
    for result in tensors_in((out,)):
        p.set(result, [x if n == m else None for x, n, m in zip(dims, a["self"].shape, result.shape, strict=True)])


def batch_norm(p: Propagation, a: Arguments, out: Any) -> None:
    """Per-channel affine map: input channels, weight, bias and running statistics face each other."""
    x = list(p.of(a["input"]))
    per_channel = [a.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    x[1] = p.tie(x[1], *(p.of(t)[0] for t in per_channel if t is not None))
    if a.get("training") or a.get("running_mean") is None:
        for dim in (x[0], *x[2:]):
            p.normalise(dim)
    result, *statistics = tensors_in((out,))
    p.set(result, x)
    for tensor in statistics:
        if tensor.shape == (result.shape[1],):
            p.set(tensor, (x[1],))


def layer_norm(p: Propagation, a: Arguments, out: Any) -> None:
    x = list(p.of(a["input"]))
    for d in range(-len(a["normalized_shape"]), 0):
        affine = [t for t in (a["weight"], a.get("bias")) if t is not None]
        if not affine:
            p.state(x[d])
        p.normalise(x[d])
        x[d] = p.tie(x[d], *(p.of(t)[d] for t in affine))
    p.set(tensors_in((out,))[0], x)


def group_norm(p: Propagation, a: Arguments, out: Any) -> None:
    """Each of the ``group`` parts loses the same places; one channel per part is a per-channel map."""
    x, groups = list(p.of(a["input"])), a["group"]
    affine = [t for t in (a["weight"], a["bias"]) if t is not None]
    if groups < a["C"]:
        p.tie_rows(x[1], groups)
        p.normalise(x[1])
    elif not affine:
        p.state(x[1])
    x[1] = p.tie(x[1], *(p.of(t)[0] for t in affine))
    result, *statistics = tensors_in((out,))
    p.set(result, x)
    for tensor in statistics:
        if groups == a["C"] and tensor.ndim == 2:
            p.set(tensor, (None, x[1]))


def reduce(p: Propagation, a: Arguments, out: Any, *, order: bool = False) -> None:
    """Reductions over ``dim``; over labels they normalise channels, and a result that is an index freezes when read."""
    x = list(p.of(a["self"]))
    over = {d % len(x) for d in as_list(a.get("dim"))} if a.get("dim") not in (None, []) else set(range(len(x)))
    for result in tensors_in((out,)):
        kept = [None if d in over else dim for d, dim in enumerate(x) if result.ndim == len(x) or d not in over]
        p.set(result, kept)
        for d in over if order and not result.is_floating_point() else ():
            p.depend(result, x[d])
    for d in over:
        p.normalise(x[d])
        if p.numbered.get(a["self"]) == d:
            p.freeze(x[d], BINS)


def spatial(p: Propagation, a: Arguments, out: Any, *, num_dims: int) -> None:
    """Pooling, resizing and padding over the last ``num_dims`` dimensions."""
    x = p.of(a["self"] if "self" in a else a["input"])
    for dim in x[-num_dims:]:
        p.freeze(dim, f"{p.here} works along it")
    for result in tensors_in((out,)):
        p.set(result, x[:-num_dims] + (None,) * num_dims)


def unfold_windows(p: Propagation, a: Arguments, out: Any) -> None:
    """``Tensor.unfold``: windows of one dimension become a last dimension."""
    x = list(p.of(a["self"]))
    p.freeze(x[a["dimension"]], f"{p.here} works along it")
    x[a["dimension"]] = None
    p.set(out, [*x, None])


def im2col(p: Propagation, a: Arguments, out: Any) -> None:
    """``(N, C, H, W) -> (N, C k, L)``: each channel becomes k neighbours."""
    x = p.of(a["self"])
    channels = x[-3]
    k = out.shape[-2] // a["self"].shape[-3]
    p.set(out, (*x[:-3], None if channels is None else np.repeat(channels, k), None))


def grid_sampler(p: Propagation, a: Arguments, out: Any) -> None:
    x = p.of(a["input"])
    for dim in (*x[2:], *p.of(a["grid"])):
        p.freeze(dim, f"{p.here} works along it")
    p.set(out, (x[0], x[1]) + (None,) * (out.ndim - 2))


def weight_norm(p: Propagation, a: Arguments, out: Any) -> None:
    """``g v / |v|``, the norm over all dimensions but ``dim``; zeros add nothing to it."""
    v, g = p.of(a["v"]), p.of(a["g"])
    dims = [dim if g_dim is None else p.tie(dim, g_dim) for dim, g_dim in zip(v, g, strict=True)]
    p.mixed += [dim for dim in dims if dim is not None]
    weight, norms = tensors_in((out,))
    p.set(weight, dims)
    p.set(norms, g)


def roi_align(p: Propagation, a: Arguments, out: Any) -> None:
    for result in tensors_in((out,)):
        p.set(result, (None, p.of(a["input"])[1], None, None))
