"""Rules of operators that move, merge, split, repeat and reverse dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch

from secateur.pruning.plan import IntArray
from secateur.pruning.rules.labels import Dim, Labels, Propagation
from secateur.pruning.rules.operators import Arguments


def flip(p: Propagation, a: Arguments, out: Any) -> None:
    dims = list(p.of(a["self"]))
    for d in a["dims"]:
        dims[d] = None if (x := dims[d]) is None else x[::-1].copy()
    p.set(out, dims)


def permute(p: Propagation, a: Arguments, out: Any) -> None:
    x = p.of(a["self"])
    p.set(out, [x[d] for d in a["dims"]])


def transpose(p: Propagation, a: Arguments, out: Any) -> None:
    x = list(p.of(a["self"]))
    if len(x) > 1:
        i, j = a.get("dim0", 0), a.get("dim1", 1)
        x[i], x[j] = x[j], x[i]
    p.set(out, x)


STATING = {"view", "reshape", "unflatten", "expand", "repeat", "multi_head_attention_forward"}
"""Torch functions that are told sizes."""


EXPANDING = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "normalize"}
"""Torch functions that repeat what has one entry as often as the code says."""


def view(p: Propagation, a: Arguments, out: Any) -> None:
    """Merging repeats labels; splitting ties what must stay rectangular; anything else freezes."""
    after = out.shape
    x, before = _refined(p.of(a["self"]), a["self"].shape, after)
    result: list[Dim] = [None] * out.ndim
    if out.numel() == 0:
        for dim in x:
            p.freeze(dim, f"{p.here} gets an empty tensor")
        return
    is_weight = p.source(a["self"]) is not None
    for ins, outs in _segments(before, after):
        labelled = [i for i in ins if x[i] is not None]
        known = [i for i in labelled if not p.is_open(x[i])]
        if known and len(known) < len(labelled):
            for i in set(labelled) - set(known):
                p.freeze(x[i], "")
            labelled = known
        if len(labelled) > 1 and is_weight:  # kernels are flattened with the channels they belong to
            for i in (i for i in labelled if i > 1):
                p.freeze(x[i], "")
            labelled = [i for i in labelled if i <= 1] or labelled
        if len(labelled) > 1:
            for i in labelled:
                p.freeze(x[i], f"{p.here} mixes it with other dimensions")
        if len(labelled) != 1:
            continue
        dim, place = x[labelled[0]], ins.index(labelled[0])
        assert dim is not None
        if len(ins) == len(outs) == 1:
            o = outs[0]
            result[o] = dim
        else:
            shape = [-1 if k == place else 1 for k in range(len(ins))]
            full = np.broadcast_to(dim.reshape(shape), [before[i] for i in ins]).reshape([after[o] for o in outs])
            k, result_dim = _carrier(p, full, outs.index(p.inferred) if p.inferred in outs else None)
            o = outs[k]
            result[o] = result_dim
        if p.function in STATING and p.inferred != o:
            p.state(result[o])
    p.set(out, result)


def _refined(x: Labels, before: Sequence[int], after: Sequence[int]) -> tuple[Labels, list[int]]:
    """Dimensions without labels, divided where dimensions of the result begin (batch and heads of an attention)."""
    ends = np.cumprod([1, *after]).tolist()
    dims: list[Dim] = []
    shape: list[int] = []
    start = 1
    for dim, n in zip(x, before, strict=True):
        stop = start * n
        inside = [end for end in dict.fromkeys(ends) if start < end < stop] if dim is None else []
        steps = [start, *inside, stop]
        if any(b % a for a, b in pairwise(steps)):
            steps = [start, stop]
        shape += [b // a for a, b in pairwise(steps)]
        dims += [dim] * (len(steps) - 1)
        start = stop
    return tuple(dims), shape


def _carrier(p: Propagation, full: IntArray, inferred: int | None) -> tuple[int, IntArray]:
    """The axis of a labelled block that carries the labels, tied along all others.

    The only axis they vary along; else the one whose size the code leaves open; else the longest of those they vary
    along (ties: the last).
    """
    lines = [np.moveaxis(full, k, 0).reshape(full.shape[k], -1) for k in range(full.ndim)]
    for k, line in enumerate(lines):
        if (line == line[:, :1]).all():
            return k, line[:, 0].copy()
    varies = [(line != line[0]).any() for line in lines]
    axis = max(range(full.ndim), key=lambda k: (varies[k], full.shape[k], k)) if inferred is None else inferred
    rows = np.moveaxis(full, axis, -1).reshape(-1, full.shape[axis])
    p.tie_rows(rows.ravel(), len(rows))
    return axis, rows[0].copy()


def _segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of equal product in two shapes; dimensions of length 1 belong to none."""
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (m := prod(before[i] for i in ins)) != (n := prod(after[o] for o in outs)):
            if m < n:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        yield ins, outs


def expand(p: Propagation, a: Arguments, out: Any) -> None:
    x = p.of(a["self"])
    for dim, n in zip(reversed(x), reversed(a["size"]), strict=False):
        if n != -1:
            p.state(dim)
    dims = [*(None,) * (out.ndim - len(x)), *x]
    if p.function in EXPANDING:
        for d in range(-len(x), 0):
            if a["self"].shape[d] == 1:
                dims[d] = p.open(out.shape[d])
    p.set(out, dims)


def repeat(p: Propagation, a: Arguments, out: Any) -> None:
    added = out.ndim - a["self"].ndim
    before, x = (1,) * added + tuple(a["self"].shape), (None,) * added + p.of(a["self"])
    dims: list[Dim] = []
    for dim, length, n in zip(x, before, a["repeats"], strict=True):
        if dim is None:
            dims.append(p.open(n) if length == 1 and p.function in EXPANDING else None)
        else:
            dims.append(np.tile(dim, n))
    p.set(out, dims)


def as_strided(p: Propagation, a: Arguments, out: Any) -> None:
    """Only a dense tensor of the same shape (``adaptive_avg_pool2d`` restores channels-last so) is followed."""
    dense = [torch.empty_like(out, device="meta", memory_format=torch.contiguous_format).stride()]
    if out.ndim == 4:
        dense.append(torch.empty_like(out, device="meta", memory_format=torch.channels_last).stride())
    wide = [d for d, n in enumerate(out.shape) if n > 1]
    if out.shape == a["self"].shape and any(all(out.stride(d) == strides[d] for d in wide) for strides in dense):
        p.set(out, p.of(a["self"]))
    else:
        for dim in p.of(a["self"]):
            p.freeze(dim, f"{p.here} reads memory at positions written in the code")


def rot90(p: Propagation, a: Arguments, out: Any) -> None:
    x = list(p.of(a["self"]))
    for d in a["dims"]:
        p.freeze(x[d], f"{p.here} works along it")
        x[d] = None
    p.set(out, x)


def view_as_real(p: Propagation, a: Arguments, out: Any) -> None:
    p.set(out, (*p.of(a["self"]), None))


def view_as_complex(p: Propagation, a: Arguments, out: Any) -> None:
    *dims, parts = p.of(a["self"])
    p.freeze(parts, f"{p.here} works along it")
    p.set(out, dims)


def pixel_shuffle(p: Propagation, a: Arguments, out: Any) -> None:
    """``(..., C r^2, H, W) -> (..., C, r H, r W)``: r^2 neighbours become one channel."""
    x = list(p.of(a["self"]))
    x[-3] = _blocks(p, x[-3], out.shape[-3])
    p.set(out, x)


def _blocks(p: Propagation, dim: Dim, number: int) -> Dim:
    """Runs of neighbours become one index each; their labels are tied."""
    if dim is None:
        return None
    blocks = dim.reshape(number, -1)
    p.tie_rows(blocks.T.ravel(), blocks.shape[1])
    return blocks[:, 0].copy()


def pixel_unshuffle(p: Propagation, a: Arguments, out: Any) -> None:
    """``(..., C, r H, r W) -> (..., C r^2, H, W)``: each channel becomes r^2 neighbours."""
    x = list(p.of(a["self"]))
    x[-3] = None if (dim := x[-3]) is None else np.repeat(dim, a["downscale_factor"] ** 2)
    p.set(out, x)


def channel_shuffle(p: Propagation, a: Arguments, out: Any) -> None:
    """Channel (g, c) moves to (c, g); each of the groups loses the same places."""
    x = list(p.of(a["self"]))
    if (dim := x[1]) is not None:
        p.tie_rows(dim, a["groups"])
        x[1] = dim.reshape(a["groups"], -1).T.ravel().copy()
    p.set(out, x)


def col2im(p: Propagation, a: Arguments, out: Any) -> None:
    """``(N, C k, L) -> (N, C, H, W)``: k neighbours become one channel."""
    x = p.of(a["self"])
    p.set(out, (*x[:-2], _blocks(p, x[-2], out.shape[-3]), None, None))
