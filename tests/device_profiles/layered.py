"""Networks and devices made of arithmetic: how long every layer takes is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateur.device_profiles import BenchmarkResult
from secateur.device_profiles.latency_model import FloatArray, Sample
from secateur.device_profiles.layers import IntArray, LayerKind, LayerTable
from secateur.device_profiles.measure import ModelSamples, Node, Process

Law = Callable[[str, int, int, int, int], float]
Channels = int | str
"""A constant number of channels, or the name of the group that owns them."""


def padded(channels: int, block: int) -> int:
    return -(-channels // block) * block


def blocked(kind: str, taps: int, pixels: int, inputs: int, outputs: int) -> float:
    """Milliseconds of a layer on a device that computes 16 channels at a time and hates odd depthwise widths."""
    if kind == "depthwise":
        return 4e-8 * taps * pixels * padded(outputs, 16) * (1.0 if outputs % 4 == 0 else 4.9) + 0.003
    work = taps * pixels * padded(inputs, 16) * padded(outputs, 16)
    return 2e-8 * work + 1e-7 * pixels * (inputs + outputs) + 0.003


def table_of(*layers: tuple[LayerKind, int, int, Channels, Channels]) -> LayerTable:
    """A table from (kind, taps, pixels, inputs, outputs) of every layer."""
    groups = tuple(dict.fromkeys(c for *_, i, o in layers for c in (i, o) if isinstance(c, str)))
    constant = np.zeros((len(layers), 2), dtype=np.int64)
    per_width = np.zeros((len(layers), 2, len(groups)), dtype=np.int64)
    for row, (*_, i, o) in enumerate(layers):
        for side, channels in enumerate((i, o)):
            if isinstance(channels, str):
                per_width[row, side, groups.index(channels)] = 1
            else:
                constant[row, side] = channels
    kinds, taps, pixels, *_ = zip(*layers, strict=True)
    names = tuple(f"layer{i}.weight" for i in range(len(layers)))
    numbers = [np.array(values, dtype=np.int64) for values in (taps, pixels, pixels)]
    return LayerTable(names, kinds, *numbers, groups, constant, per_width)


@dataclass(frozen=True)
class Network:
    """A network whose latency is a sum over its layers.

    Args:
        sizes: channels of every group, in the order of the table's.
        noise: standard deviation of the logarithm of every layer's time.
    """

    table: LayerTable
    sizes: Mapping[str, int]
    law: Law = blocked
    noise: float = 0.01
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def whole(self) -> IntArray:
        return np.array(list(self.sizes.values()), dtype=np.int64)

    def layer_ms(self, widths: IntArray) -> FloatArray:
        """True times, shape ``(layers,)``."""
        t = self.table
        channels = t.channels(widths[None])[0]
        rows = zip(t.kinds, t.taps, t.pixels, channels, strict=True)
        return np.array([self.law(k, int(taps), int(p), int(c[0]), int(c[1])) for k, taps, p, c in rows])

    def ratio(self, widths: IntArray) -> float:
        """True latency relative to the unpruned network's."""
        return float(self.layer_ms(widths).sum() / self.layer_ms(self.whole).sum())

    def macs(self, widths: IntArray) -> FloatArray:
        """Multiply-accumulates of plans, shape ``(plans,)``."""
        channels = self.table.channels(widths)
        return (self.table.taps * self.table.pixels * channels.prod(axis=2)).sum(axis=1).astype(float)

    def plans(self, count: int, rng: np.random.Generator) -> IntArray:
        """Random width vectors; those of each plan are multiples of a number of its own."""
        means, multiples = rng.uniform(0.15, 1.0, (count, 1)), rng.choice([1, 2, 4, 8, 16], (count, 1))
        wanted = np.clip(rng.normal(means, 0.2, (count, len(self.whole))), 0.05, 1.0) * self.whole
        return np.clip(np.round(wanted / multiples) * multiples, 1, self.whole).astype(np.int64)

    def times(self, widths: IntArray) -> FloatArray:
        """Times as a profile shows them, shape ``(layers,)``."""
        return self.layer_ms(widths) * np.exp(self.rng.normal(0, self.noise, len(self.table.names)))

    def sample(self, widths: IntArray) -> Sample:
        """One noisy measurement."""
        return Sample(widths, self.ratio(widths) * float(np.exp(self.rng.normal(0, self.noise))), self.times(widths))

    def result(self, widths: IntArray) -> BenchmarkResult:
        """One noisy measurement as the device gives it: ``baseline`` and ``candidate``, with a profile."""
        return result_of(self.ratio(widths), nodes_of(self.table, widths, self.times(widths)))


def nodes_of(table: LayerTable, widths: IntArray, times: FloatArray, block: int = 1) -> list[Node]:
    """A profile of a network: one operator per layer, channels reported rounded up to ``block``."""
    channels = table.channels(widths[None])[0]
    return [node_of(table, i, channels[i], float(ms), block) for i, ms in enumerate(times)]


def node_of(table: LayerTable, i: int, channels: IntArray, ms: float, block: int = 1) -> Node:
    """Layer ``i`` as the runtime reports it."""
    inputs, outputs = int(channels[0]), int(channels[1])
    if table.kinds[i] == "linear":
        shapes = ((1, inputs), (inputs, outputs)), ((1, outputs),)
        return Node(f"node{i}", "Gemm", ms, *shapes)
    side, kernel = int(table.pixels[i]), int(table.taps[i])
    weight = (padded(outputs, block), 1 if table.kinds[i] == "depthwise" else padded(inputs, block), 1, kernel)
    shapes = ((1, weight[1], 1, side), weight), ((1, weight[0], 1, side),)
    return Node(f"node{i}_nchwc", "Conv", ms, *shapes)


def integers_of(table: LayerTable, widths: IntArray, times: FloatArray) -> list[Node]:
    """A profile of the network in 8 bits: channels last, weights left out, additions in between."""
    nodes = []
    for i, (inputs, outputs) in enumerate(table.channels(widths[None])[0].tolist()):
        if table.kinds[i] == "linear":
            nodes.append(Node(f"node{i}", "QGemm", float(times[i]), ((1, inputs), (), (), (outputs,)), ((1, outputs),)))
            continue
        read = outputs if table.kinds[i] == "depthwise" else inputs
        shapes = ((1, 1, int(table.in_pixels[i]), read), (), (), (outputs,)), ((1, 1, int(table.pixels[i]), outputs),)
        nodes.append(Node(f"node{i}_token_{i}", "QLinearConv", float(times[i]), *shapes))
    return nodes


def result_of(ratio: float, nodes: list[Node], repeats: int = 20) -> BenchmarkResult:
    """A measurement of a candidate beside a baseline of 10 ms."""
    models = {
        name: ModelSamples((ms,) * repeats, (ms,) * repeats, 1.0, ms, "00", nodes=tuple(found))
        for name, ms, found in (("baseline", 10.0, []), ("candidate", 10.0 * ratio, nodes))
    }
    process = Process(models, {"cpu_pressure": 0.0}, 0.0, 1.0)
    return BenchmarkResult("test", "search", tuple(models), dict.fromkeys(models, "00"), "cpu", (process,))


def plain(depth: int = 12) -> Network:
    """3 x 3 convolutions one after another, and a linear layer."""
    names = [f"g{i}" for i in range(depth)]
    ends = zip([3, *names], names, strict=False)
    layers: list[Any] = [("conv", 9, 1024 >> 2 * (i // 4), a, b) for i, (a, b) in enumerate(ends)]
    table = table_of(*layers, ("linear", 1, 1, names[-1], 10))
    return Network(table, {name: 32 << (i // 4) for i, name in enumerate(names)})


def mobile(depth: int = 6) -> Network:
    """Inverted residuals: expand, depthwise, project."""
    layers: list[Any] = [("conv", 9, 784, 3, "s0")]
    sizes = {"s0": 24}
    for i in range(depth):
        wide, out = f"e{i}", f"s{i + 1}"
        layers += [("pointwise", 1, 784, f"s{i}", wide), ("depthwise", 9, 784, 1, wide)]
        layers += [("pointwise", 1, 784, wide, out)]
        sizes |= {wide: 96, out: 24}
    return Network(table_of(*layers, ("linear", 1, 1, f"s{depth}", 10)), sizes)


@dataclass
class LawTarget:
    """A device on which the network ``KIND-WIDTH.onnx`` takes ``law(kind, width)`` milliseconds.

    Args:
        facts: of the answer to ``prepare``.
        noise: standard deviation of the logarithm of a model's time, drawn once per process.
    """

    law: Callable[[str, int], float] = lambda kind, width: float(width)
    facts: dict[str, Any] = field(default_factory=lambda: {"cpu": "Abacus", "machine": "wood", "cpus": 4})
    noise: float = 0.0
    version: str = "1.0"
    requests: list[Mapping[str, Any]] = field(default_factory=list)

    def prepare(self) -> Mapping[str, Any]:
        return {"device": dict(self.facts), "runtime": {"onnxruntime": self.version}}

    def put(self, path: Path) -> str:
        return str(path)

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        rng = np.random.default_rng(len(self.requests))
        self.requests.append(request)
        shift = np.exp(rng.normal(0, 0.1))  # of the whole process
        models = {}
        for model in request["models"]:
            kind, _, width = Path(model["path"]).stem.partition("-")
            ms = float(self.law(kind, int(width)) * shift * np.exp(rng.normal(0, self.noise)))
            models[model["name"]] = {
                **{"wall_ms": [ms] * 5, "cpu_ms": [ms] * 5, "load_ms": 1.0, "first_ms": ms, "output_sha256": "00"}
            }
        return {"models": models, "environment": {}, "started": 0.0, "ended": 1.0}

    def fetch(self, path: str, to: Path) -> None: ...

    def close(self) -> None: ...
