"""The table of all rules, and what operators cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from secateur.pruning.rules.along import (
    along,
    batch_norm,
    grid_sampler,
    group_norm,
    im2col,
    layer_norm,
    reduce,
    roi_align,
    spatial,
    unfold_windows,
    weight_norm,
)
from secateur.pruning.rules.labels import CUTS, MAKES, Propagation, Rule, elementwise, total
from secateur.pruning.rules.operators import Arguments, Operator, tensors_in
from secateur.pruning.rules.parts import (
    cat,
    constant,
    copy_into,
    cut,
    embedding,
    glu,
    index,
    index_add,
    index_put,
    pad,
    stack,
)
from secateur.pruning.rules.products import (
    attention,
    convolution,
    deform_conv,
    distance,
    dot,
    linear,
    matmul,
    product,
    trilinear,
)
from secateur.pruning.rules.shapes import (
    as_strided,
    channel_shuffle,
    col2im,
    expand,
    flip,
    permute,
    pixel_shuffle,
    pixel_unshuffle,
    repeat,
    rot90,
    transpose,
    view,
    view_as_complex,
    view_as_real,
)

_CARRY = (
    "clone detach alias lift_fresh lift_fresh_copy _to_copy contiguous fill zero masked_fill where dropout tril triu "
    "hardswish _prelu_kernel log_sigmoid_forward rrelu_with_noise"
)
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like bernoulli native_dropout"
_VIEW = "view _unsafe_view reshape _reshape_alias flatten unflatten squeeze unsqueeze view_copy"
_REDUCE = "mean sum amax amin var std var_mean std_mean norm linalg_vector_norm prod logsumexp any all"
_SPATIAL = (
    "max_pool{}d max_pool{}d_with_indices avg_pool{}d adaptive_avg_pool{}d _adaptive_avg_pool{}d adaptive_max_pool{}d "
    "reflection_pad{}d replication_pad{}d upsample_nearest{}d _upsample_nearest_exact{}d upsample_linear{}d "
    "upsample_bilinear{}d upsample_bicubic{}d upsample_trilinear{}d _upsample_bilinear{}d_aa _upsample_bicubic{}d_aa "
    "lp_pool{}d fractional_max_pool{}d max_unpool{}d"
)
_BATCH_NORM = (
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_no_update _batch_norm_with_update miopen_batch_norm"
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention scaled_dot_product_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention"
)
ATTENTIONS = frozenset(_ATTENTION.split())
"""Operators that compute an attention."""
RULES: dict[str, Rule] = {
    **dict.fromkeys(f"{_CARRY} {_LIKE}".split(), elementwise),
    **dict.fromkeys(("add", "sub", "rsub", "addcmul", "addcdiv", "lerp"), total),
    **dict.fromkeys(_VIEW.split(), view),
    **dict.fromkeys(_BATCH_NORM.split(), batch_norm),
    **dict.fromkeys(_ATTENTION.split(), attention),
    **dict.fromkeys(_REDUCE.split(), reduce),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "median", "mode"), partial(reduce, order=True)),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), partial(along, normalises=True)),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), along),
    **dict.fromkeys(("cumsum", "roll", "sort", "topk", "index_select"), along),
    **{name: partial(spatial, num_dims=n) for n in (1, 2, 3) for name in _SPATIAL.format(*(n,) * 20).split()},
    **dict.fromkeys(CUTS, cut),
    **dict.fromkeys(("transpose", "t"), transpose),
    **dict.fromkeys((*MAKES, "new_empty_strided"), constant),
    "glu": glu,
    "copy": copy_into,
    **dict.fromkeys(("index_put", "_index_put_impl"), index_put),
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
    "permute": permute,
    "expand": expand,
    "repeat": repeat,
    "flip": flip,
    "as_strided": as_strided,
    "rot90": rot90,
    "view_as_real": view_as_real,
    "view_as_complex": view_as_complex,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "unfold": unfold_windows,
    "im2col": im2col,
    "col2im": col2im,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
    "_weight_norm_interface": weight_norm,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    "index": index,
    "embedding": embedding,
    "torchvision::roi_align": roi_align,
    "torchvision::roi_pool": roi_align,
    "torchvision::deform_conv2d": deform_conv,
    "convolution": convolution,
    "linear": linear,
    "mul": product,
    "mm": partial(matmul, left="self", right="mat2"),
    "bmm": partial(matmul, left="self", right="mat2"),
    "mv": partial(matmul, left="self", right="vec"),
    "index_add": index_add,
    "_cdist_forward": distance,
    "_euclidean_dist": distance,
    "_trilinear": trilinear,
    "dot": dot,
    "vdot": partial(dot, right="other"),
    "addmm": partial(matmul, left="mat1", right="mat2", bias="self"),
    "baddbmm": partial(matmul, left="batch1", right="batch2", bias="self"),
}


def propagation(rules: Mapping[str, Rule] | None = None) -> Propagation:
    """No labels yet.

    Args:
        rules: further rules by operator name, or others than those of ``RULES``.
    """
    return Propagation(RULES if rules is None else {**RULES, **rules})


Factor = tuple[Tensor, int]
"""A dimension of a tensor: its length is one factor of a number of MACs."""


def _all(tensor: Tensor, *, but: tuple[int, ...] = ()) -> list[Factor]:
    return [(tensor, d) for d in range(tensor.ndim) if d not in but]


def _macs_matmul(left: str, right: str) -> Callable[[Arguments, Any], list[list[Factor]]]:
    return lambda a, out: [_all(a[left]) + ([(a[right], a[right].ndim - 1)] if a[right].ndim > 1 else [])]


MACS: dict[str, Callable[[Arguments, Any], list[list[Factor]]]] = {
    "convolution": lambda a, out: [_all(a["input"] if a["transposed"] else out, but=(1,)) + _all(a["weight"])],
    "torchvision::deform_conv2d": lambda a, out: [_all(out, but=(1,)) + _all(a["weight"])],
    "linear": lambda a, out: [[*_all(a["input"]), (a["weight"], 0)]],
    "mm": _macs_matmul("self", "mat2"),
    "bmm": _macs_matmul("self", "mat2"),
    "mv": _macs_matmul("self", "vec"),
    "addmm": _macs_matmul("mat1", "mat2"),
    "_trilinear": lambda a, out: [[*_all(out), *((a["i2"], d) for d in (1, 2))]],
    "baddbmm": _macs_matmul("batch1", "batch2"),
    **dict.fromkeys(
        _ATTENTION.split(),
        lambda a, out: [
            [*_all(a["query"]), (a["key"], 2)],
            [*_all(a["query"], but=(3,)), (a["key"], 2), (a["value"], 3)],
        ],
    ),
}
"""Operator -> products of dimension lengths that sum to its MACs."""


def macs_of(operator: Operator, arguments: Arguments, out: Any) -> list[list[Factor]]:
    products = MACS.get(operator.name)
    return [] if products is None else products(arguments, out)


def written_by(operator: Operator, out: Any) -> list[Tensor]:
    """Tensors an operator allocates: its outputs without views and in-place results."""
    return tensors_in((out,)) if operator.allocates else []
