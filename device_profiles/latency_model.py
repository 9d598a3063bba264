"""Predicts the latency of plans of one network on one device from few measurements, and knows when not to be trusted.

Every measurement brings a time for every operator (the runtime's profile), so that a handful of them holds hundreds of
samples of how a layer's time follows its input and output channels. Per kind of layer that is a sum of non-negative
terms, fitted by non-negative least squares: work, traffic and calls, each with channels as they are or rounded up to
blocks, each for channel counts of one alignment; and traffic once more where widths are no whole blocks, those of the
layer or of its neighbours, because a layout is changed there. A factor per layer and one line through the measured
ratios correct the sum. What the model is worth, for widths of each multiple too, is found by leaving measurements out.

A table of isolated operators would be biased (layout changes and fusions happen between operators, not in them), and
multiply-accumulates know nothing of blocks; see docs/explanation/granularity.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.layers import KINDS, IntArray, LayerTable
from secateur.device_profiles.measure import BenchmarkResult, Node

FloatArray = npt.NDArray[np.float64]
BLOCKS = (1, 4, 8, 16)
LAYOUTS = (8, 16, 32)
"""Blocks of channels that layouts may consist of."""
REMAINDERS = (8, 16)
"""Blocks of channels that depthwise kernels may compute at a time."""
LINEAR_OPS = ("Gemm", "MatMul", "FusedMatMul", "FusedGemm", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
CONV_OPS = ("Conv", "FusedConv", "NhwcFusedConv")
INTEGER_CONV_OPS = ("QLinearConv",)
"""Their profile may leave out the weight, and have the channels last."""
MIN_SAMPLES = 5
FOLDS = 8
SHRINKAGE = 5.0
"""A layer's own factor counts as much as the kind's formula once so many measurements speak for it."""
RIDGE = 1e-2
LINE_WEIGHTS = (1.5, 0.5)
"""How strongly the line through the measured ratios is held to offset 0 and slope 1."""
WEIGHT_POWER = 0.75
"""Layers are weighed by their time to this power: between absolute (0) and relative errors (1)."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One measured plan.

    Args:
        widths: shape ``(groups,)``.
        ratio: latency, relative to the unpruned network.
        layer_ms: time of every layer of the table and of the operators between it and the next, shape ``(layers,)``;
            NaN where it was not found in the profile.
        multiple: what all widths are multiples of; 0 = not known.
    """

    widths: IntArray
    ratio: float
    layer_ms: FloatArray
    multiple: int = 0


@dataclass(frozen=True)
class Trust:
    """What a model is worth, found on measurements left out of it.

    Args:
        median_error: median relative error (fraction).
        spearman: rank correlation of predicted and measured ratios.
        half_width: 95 % of the errors are smaller than this (fraction).
        samples: measurements.
        errors: multiple of all widths -> median relative error (fraction) of the measurements that have it.
    """

    median_error: float
    spearman: float
    half_width: float
    samples: int
    errors: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """A fitted model; ``ratios`` and ``predict`` take width vectors in the order of ``table.groups``.

    Args:
        coefficients: ms per feature, shape ``(kinds, features)``.
        factors: of every layer, shape ``(layers,)``.
        line: offset and slope from summed layers to the ratio.
    """

    table: LayerTable
    coefficients: FloatArray
    factors: FloatArray
    line: FloatArray
    trust: Trust | None = None

    @classmethod
    def fit(cls, table: LayerTable, samples: Sequence[Sample], *, judge: bool = True) -> Self | None:
        """The model of some measurements; None where there are fewer than ``MIN_SAMPLES``.

        Args:
            judge: also find out what it is worth, on measurements left out.
        """
        if len(samples) < MIN_SAMPLES:
            return None
        widths = np.array([sample.widths for sample in samples])
        ratios = np.array([sample.ratio for sample in samples])
        features, times = _features(table, table.channels(widths)), _times(samples)
        coefficients = _coefficients(table, features, times)
        unscaled = cls(table, coefficients, np.ones(len(table.names)), np.array([0.0, 1.0]))
        predicted = unscaled._layers(features)
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.log(times / predicted)
        known = np.isfinite(errors)
        factors = np.exp(np.where(known, errors, 0).sum(axis=0) / (known.sum(axis=0) + SHRINKAGE))
        sums = (predicted * factors).sum(axis=1)
        rows = np.stack([np.ones_like(sums), sums], axis=1) / ratios[:, None]
        held = np.diag(LINE_WEIGHTS)
        line = np.linalg.lstsq(
            np.vstack([rows, held]), np.concatenate([np.ones(len(ratios)), [0.0, LINE_WEIGHTS[1]]]), rcond=None
        )[0]
        trust = _trust(table, samples) if judge else None
        return cls(table, coefficients, factors, line, trust)

    def ratios(self, widths: IntArray) -> FloatArray:
        """Latency of plans relative to the unpruned network, shape ``(plans,)``.

        Args:
            widths: shape ``(plans, groups)``.
        """
        layers = self._layers(_features(self.table, self.table.channels(widths)))
        predicted = self.line[0] + self.line[1] * (layers @ self.factors)
        ratios: FloatArray = np.maximum(predicted, 1e-6)
        return ratios

    def to_arrays(self) -> dict[str, FloatArray]:
        """Everything ``from_arrays`` needs, as arrays of numbers."""
        table = self.table
        layers = np.stack([[KINDS.index(k) for k in table.kinds], table.taps, table.pixels, table.in_pixels])
        return {
            "layers": layers.astype(np.float64),
            "constant": table.constant.astype(np.float64),
            "per_width": table.per_width.astype(np.float64),
            "coefficients": self.coefficients,
            "factors": self.factors,
            "line": self.line,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> Self:
        """Read what ``to_arrays`` gave (names of layers and groups are not kept)."""
        kinds, taps, pixels, in_pixels = arrays["layers"].astype(np.int64)
        constant, per_width = (arrays[key].astype(np.int64) for key in ("constant", "per_width"))
        names = tuple(str(i) for i in range(len(kinds)))
        groups = tuple(str(i) for i in range(per_width.shape[2]))
        table = LayerTable(names, tuple(KINDS[k] for k in kinds), taps, pixels, in_pixels, groups, constant, per_width)
        return cls(table, arrays["coefficients"], arrays["factors"], arrays["line"])

    def _layers(self, features: FloatArray) -> FloatArray:
        """Time of every layer by its kind's formula, shape ``(plans, layers)``."""
        known = self.coefficients.shape[1]  # a kept model of an earlier version has none of the last features
        times: FloatArray = np.einsum("plf,lf->pl", features[..., :known], self.coefficients[_kind_numbers(self.table)])
        return times


def multiple_of(widths: IntArray, sizes: IntArray) -> int:
    """The largest power of two up to 64 that all widths are multiples of, as search spaces have them.

    A group keeps all its channels, or a multiple of the number; groups too small for two steps have it halved.

    Args:
        widths: shape ``(groups,)``.
        sizes: of the unpruned network's groups, shape ``(groups,)``.
    """
    for multiple in (64, 32, 16, 8, 4, 2):
        steps = np.full(len(sizes), multiple)
        while (small := (steps > 1) & (2 * steps > sizes)).any():
            steps[small] //= 2
        if ((widths % steps == 0) | (widths == sizes)).all():
            return multiple
    return 1


def sample_of(
    table: LayerTable,
    widths: IntArray,
    result: BenchmarkResult,
    name: str,
    reference: str,
    sizes: IntArray | None = None,
) -> Sample:
    """What a measurement with a profile says about a plan.

    Args:
        widths: of the plan, shape ``(groups,)``.
        name: of the plan's model in the measurement.
        reference: of the unpruned network's model there.
        sizes: of the unpruned network's groups, shape ``(groups,)``; None = not known.
    """
    channels = table.channels(widths[None])[0]
    times = [layer_times(table, channels, process.models[name].nodes) for process in result.processes]
    multiple = 0 if sizes is None else multiple_of(np.asarray(widths), sizes)
    return Sample(np.asarray(widths), result.ratio(name, reference).value, np.min(times, axis=0), multiple)


def layer_times(table: LayerTable, channels: IntArray, nodes: Sequence[Node]) -> FloatArray:
    """A profile as one time per layer of the table, shape ``(layers,)``; NaN where a layer is not in it.

    Operators between two layers (layout changes, sums, pools) count with the layer before them. A node belongs to the
    first layer not yet found that has its kernel, its output size and its channels, which a runtime may report rounded
    up to its blocks. Of a convolution of integers the kernel may be unknown, and its input counts instead.

    Args:
        channels: of the plan, shape ``(layers, 2)``.
    """
    times = np.full(len(table.names), np.nan)
    between, last = np.zeros(len(table.names)), -1
    for node in nodes:
        hit = next((i for i in np.flatnonzero(np.isnan(times)) if _fits(table, int(i), channels[i], node)), None)
        if hit is not None:
            last = int(hit)
            times[last] = node.ms
        else:
            between[max(last, 0)] += node.ms
    return times + between


def _fits(table: LayerTable, i: int, channels: IntArray, node: Node) -> bool:
    """Whether an operator can be layer ``i``."""
    if len(node.input_shapes) < 2 or not node.output_shapes:
        return False
    if table.kinds[i] == "linear":
        return node.op in LINEAR_OPS and node.output_shapes[0][-1] == channels[1]
    if node.op in INTEGER_CONV_OPS:
        return _fits_integers(table, i, channels, node)
    weight, out = node.input_shapes[1], node.output_shapes[0]
    if node.op not in CONV_OPS or len(weight) < 3 or len(out) < 3:
        return False
    sizes = int(np.prod(weight[2:])), int(np.prod(out[2:]))
    near = all(has <= told < has + max(BLOCKS) for has, told in zip(channels[::-1], weight[:2], strict=True))
    return sizes == (table.taps[i], table.pixels[i]) and near


def _fits_integers(table: LayerTable, i: int, channels: IntArray, node: Node) -> bool:
    """Whether a convolution of integers can be layer ``i``: by its output, its input, and its kernel where told."""
    kernel = next((shape[2:] for shape in node.input_shapes[1:] if len(shape) > 2), None)
    if kernel is not None and int(np.prod(kernel)) != table.taps[i]:
        return False
    read, written = node.input_shapes[0], node.output_shapes[0]
    inputs = int(channels[1] if table.kinds[i] == "depthwise" else channels[0])
    values = int(np.prod(written[1:])), int(np.prod(read[1:]))
    if int(channels[1]) not in (written[1], written[-1]) or values[0] != table.pixels[i] * channels[1]:
        return False
    groups, rest = divmod(values[1], int(table.in_pixels[i]) * inputs)  # of a grouped one a filter sees one group
    return rest == 0 and (groups == 1 or table.kinds[i] == "conv")


def choose(table: LayerTable, pool: IntArray, chosen: IntArray) -> int:
    """Which plan of a pool to measure next: the one the measured ones say least about.

    Plans are compared by the shares of each feature in their layers; the next one has the largest variance left under a
    linear model of those (a greedy D-optimal design).

    Args:
        pool: width vectors, shape ``(plans, groups)``.
        chosen: those measured so far, shape ``(n, groups)``, ``n >= 0``.

    Returns:
        Its index in the pool.
    """
    every = np.concatenate([pool, chosen]) if len(chosen) else pool
    features = _features(table, table.channels(every), layouts=False)  # those of widths spread plans enough
    kinds = _kind_numbers(table)
    sums = np.concatenate([features[:, kinds == kind].sum(axis=1) for kind in np.unique(kinds)], axis=1)
    spread = sums.std(axis=0)
    values = (sums[:, spread > 0] - sums[:, spread > 0].mean(axis=0)) / spread[spread > 0]
    values /= np.sqrt(max(1, values.shape[1]))
    values = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    seen = values[len(pool) :]
    precision = 0.05 * np.eye(values.shape[1]) + seen.T @ seen
    left = np.einsum("pf,fg,pg->p", values[: len(pool)], np.linalg.inv(precision), values[: len(pool)])
    return int(np.argmax(left))


def _trust(table: LayerTable, samples: Sequence[Sample]) -> Trust:
    """Measurements predicted by models of the others, ``FOLDS`` times (or as often as there are measurements)."""
    ratios, predicted = np.array([sample.ratio for sample in samples]), np.full(len(samples), np.nan)
    folds = min(FOLDS, len(samples))
    for fold in range(folds):
        model = LatencyModel.fit(table, [s for i, s in enumerate(samples) if i % folds != fold], judge=False)
        if model is not None:
            predicted[fold::folds] = model.ratios(np.array([sample.widths for sample in samples[fold::folds]]))
    errors = np.abs(predicted / ratios - 1)
    if not np.isfinite(errors).all() or np.ptp(ratios) == 0 or np.ptp(predicted) == 0:
        return Trust(float("inf"), 0.0, float("inf"), len(samples))
    from scipy.stats import spearmanr  # not at the top: what only predicts needs no SciPy

    spearman = float(spearmanr(predicted, ratios).statistic)
    multiples = np.array([sample.multiple for sample in samples])
    each = {int(m): float(np.median(errors[multiples == m])) for m in np.unique(multiples) if m}
    return Trust(float(np.median(errors)), spearman, float(1.96 * np.sqrt(np.mean(errors**2))), len(samples), each)


def _times(samples: Sequence[Sample]) -> FloatArray:
    """Layers' shares of the measured ratios, shape ``(samples, layers)``: a profile's own clock does not matter."""
    shares = np.array([sample.layer_ms for sample in samples])
    ratios = np.array([sample.ratio for sample in samples])
    times: FloatArray = shares / np.nansum(shares, axis=1, keepdims=True) * ratios[:, None]
    return times


def _coefficients(table: LayerTable, features: FloatArray, times: FloatArray) -> FloatArray:
    """Non-negative least squares per kind of layer, shape ``(kinds, features)``."""
    from scipy.optimize import nnls

    kinds, coefficients = _kind_numbers(table), np.zeros((len(KINDS), features.shape[2]))
    floor = 0.2 * float(np.nanmedian(times))
    for kind in np.unique(kinds):
        rows = features[:, kinds == kind].reshape(-1, features.shape[2])
        wanted = times[:, kinds == kind].ravel()
        known = np.isfinite(wanted)
        if not known.any():
            continue
        rows, wanted = rows[known], wanted[known]
        scale = rows.max(axis=0)
        scale[scale == 0] = 1.0
        weights = 1 / np.maximum(wanted, floor) ** WEIGHT_POWER
        weighed = rows / scale * weights[:, None]
        ridge = RIDGE * np.linalg.norm(weighed, axis=0).max() * np.eye(features.shape[2])
        target = np.concatenate([wanted * weights, np.zeros(len(ridge))])
        solution, _ = nnls(np.vstack([weighed, ridge]), target, maxiter=100 * features.shape[2])
        coefficients[kind] = solution / scale
    return coefficients


def _features(table: LayerTable, channels: IntArray, *, layouts: bool = True) -> FloatArray:
    """Non-negative terms a layer's time may be made of, shape ``(plans, layers, features)``.

    Args:
        channels: shape ``(plans, layers, 2)``.
        layouts: with what changes of layout cost.
    """
    depthwise = _kind_numbers(table) == KINDS.index("depthwise")
    outputs = channels[..., 1].astype(np.float64)
    inputs = np.where(depthwise, outputs, channels[..., 0])
    per_filter = np.where(depthwise, 1.0, channels[..., 0])
    taps, pixels, in_pixels = (array.astype(np.float64) for array in (table.taps, table.pixels, table.in_pixels))

    def padded(values: FloatArray, block: int) -> FloatArray:
        return np.ceil(values / block) * block

    def work(block_in: int, block_out: int) -> FloatArray:
        return taps * pixels * np.where(depthwise, 1.0, padded(per_filter, block_in)) * padded(outputs, block_out)

    small, odd_in, odd_out = inputs < max(BLOCKS), inputs % 4 != 0, outputs % 4 != 0
    classes = (
        np.ones_like(small),
        small,
        ~small & odd_in,
        ~small & ~odd_in,
        odd_out,
        (~small & odd_in) | odd_out,
    )
    works = [work(block, block) for block in BLOCKS] + [work(1, max(BLOCKS))]
    block = max(BLOCKS)
    traffic = [pixels * outputs, pixels * padded(outputs, block), in_pixels * inputs, in_pixels * padded(inputs, block)]
    calls = [np.broadcast_to(pixels, outputs.shape), np.broadcast_to(in_pixels, outputs.shape), np.ones_like(outputs)]
    weights = [taps * per_filter * outputs, taps * padded(per_filter, block) * padded(outputs, block)]
    terms = [term * chosen for term in (*works, *traffic, *calls) for chosen in classes]
    more: list[FloatArray] = []
    if layouts:
        wide = max(LAYOUTS)
        more = [work(wide, wide), *_layouts(table, channels, pixels * outputs, in_pixels * inputs)]
    return np.stack([*terms, *weights, *more, *_channelwise(taps * pixels * depthwise, outputs)], axis=-1)


def _channelwise(positions: FloatArray, outputs: FloatArray) -> list[FloatArray]:
    """Work of depthwise layers that is not done in whole blocks: kernels of integers take what is left one by one.

    Args:
        positions: kernel positions times output positions; 0 of other layers, shape ``(layers,)``.
        outputs: channels, shape ``(plans, layers)``.
    """
    terms = []
    for block in REMAINDERS:
        left = outputs % block
        terms += [positions * left, positions * outputs * (left > 0)]
    return terms


def _layouts(table: LayerTable, channels: IntArray, written: FloatArray, read: FloatArray) -> list[FloatArray]:
    """What changes of layout may cost: traffic where channels are no whole blocks, or those of neighbours are none.

    Args:
        channels: shape ``(plans, layers, 2)``.
        written: output values of every layer, shape ``(plans, layers)``.
        read: input values, shape ``(plans, layers)``.
    """
    terms = []
    for block in LAYOUTS:
        broken = (channels % block != 0) & table.varies
        around = broken.any(axis=-1) @ table.neighbours
        mixed = broken[..., 0] != broken[..., 1]
        terms += [read * broken[..., 0], written * broken[..., 1], (read + written) * mixed]
        terms += [read * around, written * around]
    return terms


def _kind_numbers(table: LayerTable) -> npt.NDArray[np.int64]:
    return np.array([KINDS.index(kind) for kind in table.kinds], dtype=np.int64)
