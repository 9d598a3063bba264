"""Rules of operators that multiply and sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from secateur.pruning.rules.labels import (
    BINS,
    Dim,
    Grouped,
    Propagation,
    elementwise,
    fixed,
    numbers_places,
    weight_name,
)
from secateur.pruning.rules.operators import Arguments, tensors_in


def convolution(p: Propagation, a: Arguments, out: Any) -> None:
    """Weight ``(out, in / groups, ...)``, transposed ``(in, out / groups, ...)``."""
    x, weight, groups = p.of(a["input"]), a["weight"], a["groups"]
    w = p.of(weight)
    for dim in w[2:]:
        p.freeze(dim, "")
    if any(dim is not None for dim in x[2:]):
        for dim in x[2:]:
            p.freeze(dim, f"{p.here} slides along it")
    channels = (_transposed if a["transposed"] else _direct)(p, x[1], weight, groups, a["input"].shape[1])
    if a["bias"] is not None:
        p.tie(channels, p.of(a["bias"])[0])
    p.set(out, (x[0], channels) + (None,) * (out.ndim - 2))


def _direct(p: Propagation, x: Dim, weight: Tensor, groups: int, num_inputs: int) -> Dim:
    w = p.of(weight)
    if groups > 1 and groups == num_inputs:
        _scale_groups(p, weight)
        p.tie(_repeated(x, weight.shape[0] // groups), w[0])
        return w[0]
    if groups > 1 and w[0] is not None:
        p.grouped.append(Grouped(p.source(weight), groups, x, w[0], w[1]))
    else:
        if groups == 1 and numbers_places(weight, 1):
            p.freeze(p.tie(x, w[1]), BINS)
        p.tie(x, w[1] if w[1] is None or groups == 1 else np.tile(w[1], groups))
        p.tie_rows(x, groups)
    p.read(weight, 1)
    return w[0]


def _repeated(dim: Dim, times: int) -> Dim:
    """Each label several times in a row."""
    return dim if dim is None or times == 1 else np.repeat(dim, times)


def _transposed(p: Propagation, x: Dim, weight: Tensor, groups: int, num_inputs: int) -> Dim:
    w = p.of(weight)
    p.tie(x, w[0])
    if groups > 1 and groups == num_inputs:
        _scale_groups(p, weight)
        p.freeze(w[1], "")
        return None if w[0] is None else np.repeat(w[0], weight.shape[1])
    p.tie_rows(w[0], groups)
    p.read(weight, 0)
    if w[1] is None and groups > 1:
        return fixed(p, groups, f"{p.here} has one output per group")
    return None if w[1] is None else np.tile(w[1], groups)


def _scale_groups(p: Propagation, weight: Tensor) -> None:
    source = p.source(weight)
    if source is not None:
        p.scaled_groups.setdefault(weight_name(source))


def product(p: Propagation, a: Arguments, out: Any) -> None:
    """Element by element; with the sum over one dimension an expected value, which ``reduce`` then sees."""
    elementwise(p, a, out)
    for factor in tensors_in(a.values()):
        for d in range(-factor.ndim, 0):
            if factor.shape[d] == out.shape[d] and numbers_places(factor, d):
                p.numbered[out] = out.ndim + d


def matmul(p: Propagation, a: Arguments, out: Any, *, left: str, right: str, bias: str | None = None) -> None:
    """``(..., m, k) @ (..., k, n)``, both of the same rank (or a vector on the right), plus a broadcast bias."""
    x, y = a[left], a[right]
    p.contract(x, -1, y, -2 if y.ndim > 1 else 0)
    batch = [p.tie(*facing) for facing in zip(p.of(x)[:-2], p.of(y)[:-2], strict=False)]
    dims = [*batch, p.of(x)[-2]] + ([p.of(y)[-1]] if y.ndim > 1 else [])
    if bias is not None:
        add = p.of(a[bias])
        for d in range(-a[bias].ndim, 0):
            if a[bias].shape[d] == out.shape[d] != 1:
                if p.source(a[bias]) is None:
                    p.added(dims[d], add[d])
                dims[d] = p.tie(dims[d], add[d])
    p.set(out, dims)


def dot(p: Propagation, a: Arguments, out: Any, *, right: str = "tensor") -> None:
    p.contract(a["self"], 0, a[right], 0)


def deform_conv(p: Propagation, a: Arguments, out: Any) -> None:
    """A convolution at sampled places; the places themselves are no channels."""
    for name in ("offset", "mask") if a["use_mask"] else ("offset",):
        for dim in p.of(a[name]):
            p.freeze(dim, f"{p.here} reads places from it")
    convolution(p, {**a, "transposed": False}, out)


def linear(p: Propagation, a: Arguments, out: Any) -> None:
    p.contract(a["input"], -1, a["weight"], 1)
    channels = p.of(a["weight"])[0]
    if a["bias"] is not None:
        p.tie(channels, p.of(a["bias"])[0])
    p.set(out, (*p.of(a["input"])[:-1], channels))


def attention(p: Propagation, a: Arguments, out: Any) -> None:
    """``softmax(q k^T / sqrt(d)) v`` of ``(batch, heads, length, d)``; the scale follows d, so d normalises."""
    query, key, value = a["query"], a["key"], a["value"]
    q, k, v = p.of(query), p.of(key), p.of(value)
    p.normalise(p.tie(q[3], k[3]))
    p.normalise(p.tie(k[2], v[2]))
    heads = p.tie(q[1], k[1], v[1])
    for result in tensors_in((out,)):
        if result.shape == (*query.shape[:3], value.shape[3]):
            p.set(result, (p.tie(q[0], k[0], v[0]), heads, q[2], v[3]))
            return


def distance(p: Propagation, a: Arguments, out: Any) -> None:
    """``cdist``: every row of ``(..., m, k)`` to every row of ``(..., n, k)``; distances are over the kept k only."""
    x, y = a["x1"], a["x2"]
    p.contract(x, -1, y, -1)
    p.normalise(p.of(x)[-1])
    p.normalise(p.of(y)[-1])
    leading = out.ndim - 2
    batch = [
        p.tie(*(p.of(t)[d - 2] for t in (x, y) if t.ndim - 2 >= -d and t.shape[d - 2] == out.shape[d - 2] != 1))
        for d in range(-leading, 0)
    ]
    p.set(out, [*batch, p.of(x)[-2], p.of(y)[-2]])


def trilinear(p: Propagation, a: Arguments, out: Any) -> None:
    """Three tensors multiplied and summed (``nn.Bilinear``): each has ones at ``expand``, ``sumdim`` is summed over."""
    tensors = [a["i1"], a["i2"], a["i3"]]
    places: list[list[tuple[Tensor, int]]] = []
    for tensor, expanded in zip(tensors, (a["expand1"], a["expand2"], a["expand3"]), strict=True):
        own = iter(range(tensor.ndim))
        for d in range(tensor.ndim + len(expanded)):
            places += [[]] if d == len(places) else []
            if d not in expanded:
                places[d].append((tensor, next(own)))
    dims = [p.tie(*(p.of(t)[i] for t, i in facing)) for facing in places]
    has_weight = any(p.source(t) is not None for t in tensors)
    for d in a["sumdim"]:
        for tensor, i in places[d]:
            p.read(tensor, i)
        if (dim := dims[d]) is not None and not has_weight:
            p.mixed.append(dim)
    p.set(out, [dim for d, dim in enumerate(dims) if d not in a["sumdim"]])
