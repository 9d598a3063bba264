"""Rules of operators that join, cut, pick and write parts of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.pruning.rules.labels import MAKES, Dim, Propagation, fixed
from secateur.pruning.rules.operators import Arguments, tensors_in


def constant(p: Propagation, a: Arguments, out: Any) -> None:
    """``zeros``, ``new_ones`` and the like: sizes come from the code, nothing of the input."""
    if p.function in MAKES and out.numel():
        first = p.open(out.shape[0]) if out.ndim else None
        p.set(
            out,
            (first, first)
            if p.operator == "eye" and out.shape[0] == out.shape[1]
            else [first, *(p.open(n) for n in out.shape[1:])][: out.ndim],
        )


def cat(p: Propagation, a: Arguments, out: Any) -> None:
    parts = [t for t in a["tensors"] if t.ndim == out.ndim]
    where = a["dim"] % out.ndim
    dims = [p.tie(*(p.of(t)[d] for t in parts)) if d != where else None for d in range(out.ndim)]
    pieces = [p.of(t)[where] for t in parts]
    if any(piece is not None for piece in pieces):
        reason = f"{p.here} appends channels of fixed number"
        dims[where] = np.concatenate(
            [
                piece if piece is not None else fixed(p, t.shape[where], reason)
                for piece, t in zip(pieces, parts, strict=True)
            ]
        )
    p.set(out, dims)


def stack(p: Propagation, a: Arguments, out: Any) -> None:
    parts, where = a["tensors"], a["dim"] % out.ndim
    dims = [p.tie(*facing) for facing in zip(*(p.of(t) for t in parts), strict=True)]
    p.set(out, [*dims[:where], None, *dims[where:]])


def pad(p: Propagation, a: Arguments, out: Any) -> None:
    """Padding of a labelled dimension has an amount written in the code: its positions are frozen."""
    dims = list(p.of(a["self"]))
    for k in range(len(a["pad"]) // 2):
        before, after = a["pad"][2 * k : 2 * k + 2]
        d = len(dims) - 1 - k
        if (dim := dims[d]) is None or (before, after) == (0, 0):
            continue
        reason = f"{p.here} pads the channels by a number written in the code"
        if before < 0 or after < 0:
            p.freeze(dim, reason)
        dim = dim[max(0, -before) : len(dim) + min(0, after)]
        dims[d] = np.concatenate([fixed(p, max(0, before), reason), dim, fixed(p, max(0, after), reason)])
    p.set(out, dims)


def cut(p: Propagation, a: Arguments, out: Any) -> None:
    """``slice``, ``select``, ``split`` and ``unbind`` along one dimension; equal parts of a split are tied."""
    whole = a["self"]
    x, where = list(p.of(whole)), a["dim"] % whole.ndim
    dim, pieces = x[where], tensors_in((out,))
    if pieces[0].ndim < len(x):
        p.freeze(dim, f"{p.here} picks channels by position")
        parts: list[Dim] = [None] * len(pieces)
        places: list[slice | int] = [a["index"]] if "index" in a else list(range(len(pieces)))
    elif "step" in a:
        places = [slice(a["start"], a["end"], a["step"])]
        parts = [None if dim is None else dim[places[0]]]
        if dim is not None and pieces[0].shape[where] < len(dim):
            if pieces[0].shape[where] == 1:
                p.freeze(dim, f"{p.here} picks channels by position")
            p.state(dim)
    else:
        sizes = [piece.shape[where] for piece in pieces]
        ends = np.cumsum(sizes).tolist()
        places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        parts = [None if dim is None else dim[place] for place in places]
        if dim is not None and len(pieces) > 1:
            if len(set(sizes)) == 1 and (p.function == "chunk" or "split_size" in a):
                p.tie_rows(dim, len(sizes))
            if p.function != "chunk" or len(set(sizes)) > 1:
                p.state(dim)
            for part in (part for part, size in zip(parts, sizes, strict=True) if size == 1):
                p.freeze(part, f"{p.here} picks channels by position")
    for piece, part, place in zip(pieces, parts, places, strict=True):
        kept = [d for d in range(len(x)) if d != where or piece.ndim == len(x)]
        p.set(piece, [part if d == where else x[d] for d in kept])
        p.part(piece, whole, kept, where, place)


def copy_into(p: Propagation, a: Arguments, out: Any) -> None:
    """``self`` takes the labels of what is copied into it."""
    old, source = p.of(out), a["src"]
    new: list[Dim] = []
    for d in range(-out.ndim, 0):
        faces = source.ndim >= -d and source.shape[d] == out.shape[d] != 1
        if not faces:
            new.append(old[d])
        elif (dim := p.of(source)[d]) is None:
            p.freeze(old[d], f"{p.here} overwrites it with a tensor of fixed size")
            new.append(old[d])
        else:
            new.append(dim if old[d] is None else p.tie(dim, old[d]))
    p.set(out, new)


def index_put(p: Propagation, a: Arguments, out: Any) -> None:
    """Rows written by an index: the other dimensions face each other."""
    x, values = list(p.of(a["self"])), a["values"]
    used = _indexed(a["indices"])
    whole = [d for d in range(len(x)) if d not in used]
    simple = used == list(range(len(used)))
    for d in used if simple else range(len(x)):
        p.freeze(x[d], f"{p.here} picks channels by position")
    for d in range(values.ndim):
        faces = len(x) - values.ndim + d
        if not simple or faces not in whole:
            p.freeze(p.of(values)[d], f"{p.here} picks channels by position")
        elif (dim := p.of(values)[d]) is not None:
            p.state(dim)
            x[faces] = dim if x[faces] is None else p.tie(x[faces], dim)
            p.relabelled.append(out)
        elif values.shape[d] == out.shape[faces] != 1:
            p.freeze(x[faces], f"{p.here} overwrites it with a tensor of fixed size")
    p.set(out, x)


def glu(p: Propagation, a: Arguments, out: Any) -> None:
    """The first half of a dimension gated by the second: halves are tied."""
    dims = list(p.of(a["self"]))
    if (dim := dims[a["dim"]]) is not None:
        p.tie_rows(dim, 2)
        dims[a["dim"]] = dim[: len(dim) // 2]
    p.set(out, dims)


def index(p: Propagation, a: Arguments, out: Any) -> None:
    """Advanced indexing of unlabelled dimensions; labels among the indexed ones are frozen."""
    x, indices = list(p.of(a["self"])), a["indices"]
    used = _indexed(indices)
    touched = [x[i] for i in used] + [dim for idx in indices if idx is not None for dim in p.of(idx)]
    for dim in touched:
        p.freeze(dim, f"{p.here} picks channels by position")
    if used == list(range(used[0], used[-1] + 1)):
        new: list[Dim] = [None] * (out.ndim - len(x) + len(used))
        p.set(out, x[: used[0]] + new + x[used[-1] + 1 :])
    else:
        for dim in x:
            p.freeze(dim, f"{p.here} moves dimensions")


def _indexed(indices: Sequence[Tensor | None]) -> list[int]:
    """Dimensions that indices pick from; a mask picks from as many as it has itself."""
    used: list[int] = []
    d = 0
    for idx in indices:
        width = idx.ndim if idx is not None and idx.dtype in (torch.bool, torch.uint8) else 1
        used += range(d, d + width) if idx is not None else ()
        d += width
    return used


def embedding(p: Propagation, a: Arguments, out: Any) -> None:
    rows, features = p.of(a["weight"])
    p.freeze(rows, "")
    p.set(out, (None,) * (out.ndim - 1) + (features,))


def index_add(p: Propagation, a: Arguments, out: Any) -> None:
    """Rows added at places; the other dimensions face each other."""
    dims = list(p.of(a["self"]))
    for d, dim in enumerate(p.of(a["source"])):
        if d == a["dim"] % out.ndim:
            p.freeze(dims[d], f"{p.here} picks channels by position")
            p.freeze(dim, f"{p.here} picks channels by position")
        else:
            dims[d] = p.tie(dims[d], dim)
    p.set(out, dims)
