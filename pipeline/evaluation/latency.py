"""What a plan's latency is: measured on the device, or predicted by a model that has proven good on this network.

The model learns from every measurement of the run, and from a bounded number of its own, of the plans the others say
least about. It is trusted while measurements left out of it are predicted well; then only what it is unsure about, one
in ten against drift, and whatever is fine-tuned are still measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from secateur.device_profiles import BenchmarkResult, DeviceError
from secateur.device_profiles.latency_model import LatencyModel, Sample, choose, multiple_of, sample_of
from secateur.device_profiles.layers import LayerTable
from secateur.pipeline.config.schema import LatencySection
from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace

Figures = Mapping[str, float]
LATENCIES = (
    *("latency_ratio", "latency_ratio_low", "latency_ratio_high", "p50_ms", "p95_ms", "size_bytes"),
    "latency_measured",
)
"""What figures consist of."""
POOL = 400
"""Random plans among which the next measurement is chosen."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
REFIT_EVERY = 5
CHECK_EVERY = 10
"""One in so many predicted plans is measured all the same: devices drift."""

Watch = Callable[[int, int], None]
"""Told how much of how much is done."""


def unwatched(done: int, total: int) -> None:
    """Tell nobody."""


class LatencyOracle(Protocol):
    """The latencies of one network's plans: on one device (``Latencies``) or on many (``FleetLatencies``)."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Their names, the run's own first."""

    @property
    def num_measurements(self) -> int:
        """How often a device has measured."""

    def of(self, plan: PruningPlan, *, exact: bool) -> Figures:
        """Figures of a plan, measured or predicted; ``exact`` = measured in any case."""

    def take(self, plan: PruningPlan, figures: Figures) -> None:
        """Take a plan's figures from an earlier evaluation."""

    def model(self, watch: Watch = unwatched) -> LatencyModel | None:
        """The one model of the latency that is trusted, if there is one; measures plans of its own first."""

    def report(self) -> dict[str, Any]:
        """How many plans were measured and predicted, and what the model is worth."""


class Latencies:
    """Latencies of one network's plans on one device.

    Args:
        table: the network's layers; None = they are not known, everything is measured.
        measure: a plan -> figures (``latency_ratio``, ``p50_ms`` ...) and the raw result of a measurement with a
            profile of the operators, in which the plan is ``candidate`` and the unpruned network ``baseline``.
        file: where raw results are kept, one JSON line each; those of a killed run are taken up again.
        settings: ``search.latency`` of the run file.
        space: where plans to measure are drawn from; None = the model gets no measurements of its own.
        seed: of the draws.
        device: its name.
        dense: figures of the unpruned network in fp32, which ratios are to; None = these latencies are of fp32.
    """

    def __init__(
        self,
        table: Callable[[], LayerTable | None],
        measure: Callable[[PruningPlan], tuple[dict[str, float], BenchmarkResult]],
        file: Path,
        settings: LatencySection,
        space: SearchSpace | None = None,
        seed: int = 0,
        device: str = "the device",
        dense: Callable[[], Figures] | None = None,
    ) -> None:
        self._table, self._measure, self.file, self.settings = table, measure, file, settings
        self.space, self.seed, self.devices, self._dense = space, seed, (device,), dense
        self.num_measurements = 0
        self.measured: dict[str, Figures] = {}
        self.samples: dict[str, Sample] = {}
        self.num_predicted = 0
        self._num_trusted = 0
        self._model: LatencyModel | None = None
        self._fitted = 0
        self._loaded = False

    def of(self, plan: PruningPlan, *, exact: bool) -> Figures:
        """Figures of a plan; ``latency_measured`` is 1 where they were measured and 0 where they were predicted.

        Args:
            exact: measure it, whatever the model says.
        """
        return self.known(plan, exact=exact) or self.measure(plan)

    def known(self, plan: PruningPlan, *, exact: bool) -> Figures | None:
        """Figures of a plan that was measured, or that a trusted model predicts; None = it has to be measured."""
        if plan.digest in self.measured:
            return self.measured[plan.digest]
        return None if exact or self.settings.mode == "measure" or plan.is_full else self._predicted(plan)

    def measure(self, plan: PruningPlan) -> Figures:
        """Measure a plan, and learn from it."""
        figures, result = self._measure(plan)
        self.num_measurements += 1
        self.take(plan, {**figures, "latency_measured": 1.0})
        if not plan.is_full or self._dense:  # in fp32 its ratio is 1 and teaches nothing
            self._learn(plan, result)
        return self.measured[plan.digest]

    def take(self, plan: PruningPlan, figures: Figures) -> None:
        """Take a plan's figures, measured here or in an earlier evaluation; whatever else is among them is left out."""
        self.measured[plan.digest] = {name: figures[name] for name in LATENCIES if name in figures}

    def model(self, watch: Watch = unwatched) -> LatencyModel | None:
        """The model, if it is trusted; measures plans of its own first, as far as the run file allows.

        Args:
            watch: told how many of its measurements are done.
        """
        table = self._layers()
        if self.settings.mode == "measure" or self.space is None or table is None:
            return None
        self._load()
        pool = np.unique(random_widths(self.space, POOL, np.random.default_rng(self.seed)), axis=0)
        pool = pool[(pool != widths_of(self.space.full)).any(axis=1)]  # its ratio is 1 and teaches nothing
        unread = 0
        while len(self.samples) + unread < self.settings.measurements:
            watch(len(self.samples), self.settings.measurements)
            chosen = np.array([sample.widths for sample in self.samples.values()]).reshape(-1, pool.shape[1])
            pool = pool[(pool[:, None] != chosen[None]).any(axis=2).all(axis=1)]
            if not len(pool):
                break
            plan = plan_of(self.space.full, self._next(table, pool, chosen))
            before = len(self.samples)
            self.of(plan, exact=True)
            if len(self.samples) == before:  # its profile could not be read
                unread += 1
                pool = pool[(pool != widths_of(plan)).any(axis=1)]
        return self._trusted()

    def _next(self, table: LayerTable, pool: IntArray, chosen: IntArray) -> IntArray:
        """The plan of a pool to measure next: of the multiple that was measured least, what says most."""
        assert self.space is not None
        sizes = widths_of(self.space.full)
        multiples = np.array([multiple_of(widths, sizes) for widths in pool])
        measured = [multiple_of(widths, sizes) for widths in chosen]
        least = min(np.unique(multiples).tolist(), key=measured.count)
        rows = pool[multiples == least]
        found: IntArray = rows[choose(table, rows, chosen)]
        return found

    def report(self) -> dict[str, Any]:
        """What the model is worth and how much it was used, for the report."""
        trust = self._model.trust if self._model else None
        facts = {
            "measured": len(self.measured),
            "predicted": self.num_predicted,
            "trusted": self._trusted() is not None,
        }
        return facts | ({} if trust is None else asdict(trust))

    def _predicted(self, plan: PruningPlan) -> Figures | None:
        """What the model says of a plan; None where it must be measured."""
        model = self._trusted()
        if model is None or model.trust is None or (full := self._reference(plan)) is None:
            return None
        self._num_trusted += 1
        if self._num_trusted % CHECK_EVERY == 0:
            return None
        self.num_predicted += 1
        ratio = float(model.ratios(widths_of(plan)[None])[0])
        spread = 1 + model.trust.half_width
        figures = {"latency_ratio": ratio, "latency_ratio_low": ratio / spread, "latency_ratio_high": ratio * spread}
        times = {name: ratio * full[name] for name in ("p50_ms", "p95_ms")}
        return {**figures, **times, "latency_measured": 0.0}

    def _reference(self, plan: PruningPlan) -> Figures | None:
        """Figures of the unpruned network in fp32; None = it was not measured."""
        return self._dense() if self._dense else self.measured.get(PruningPlan(plan.sizes, _whole(plan)).digest)

    def _trusted(self) -> LatencyModel | None:
        """The model of everything measured so far, if it predicts what is left out well enough."""
        self._load()
        table, count = self._layers(), len(self.samples)
        if table is None:
            return None
        if count >= self._fitted + REFIT_EVERY or self._fitted < count == self.settings.measurements:
            self._model, self._fitted = LatencyModel.fit(table, list(self.samples.values())), count
        trust = self._model.trust if self._model else None
        if trust is None or trust.samples < self.settings.measurements:
            return None
        good = trust.median_error <= self.settings.max_error and trust.spearman >= self.settings.min_spearman
        return self._model if good else None

    def _learn(self, plan: PruningPlan, result: BenchmarkResult) -> None:
        """Keep a measurement, and let the model learn from it."""
        widths = widths_of(plan)
        line = {"plan": plan.digest, "widths": widths.tolist(), "result": json.loads(result.to_json())}
        with self.file.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else b"\n")  # a line cut short by a crash stays alone
            file.write(json.dumps(line).encode("ascii") + b"\n")
        self._add(plan.digest, widths, result)

    def _add(self, digest: str, widths: IntArray, result: BenchmarkResult) -> None:
        table = self._layers() if self.settings.mode != "measure" else None
        if table is None:
            return
        sizes = None if self.space is None else widths_of(self.space.full)
        sample = sample_of(table, widths, result, "candidate", "baseline", sizes)
        if np.isfinite(sample.layer_ms).all():
            self.samples[digest] = sample

    def _load(self) -> None:
        """Take up the measurements of an earlier process of the same run; a line cut short by a crash is left out."""
        if self._loaded or not self.file.is_file():
            return
        self._loaded = True
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                data = json.loads(line)
                result = BenchmarkResult.from_json(json.dumps(data["result"]))
                if data["plan"] not in self.samples and "candidate" in result.names:
                    self._add(data["plan"], np.array(data["widths"], dtype=np.int64), result)
            except (ValueError, KeyError, TypeError, RecursionError, DeviceError):
                continue

    def _layers(self) -> LayerTable | None:
        """The table, if there is a layer in it."""
        table = self._table()
        return table if table is not None and table.names else None


def widths_of(plan: PruningPlan) -> IntArray:
    """Width vector over all groups of the network, shape ``(groups,)``."""
    return np.array(list(plan.widths.values()), dtype=np.int64)


def plan_of(full: PruningPlan, widths: IntArray) -> PruningPlan:
    """The plan that keeps the first channels of every group; latency does not depend on which."""
    return full.replace({name: range(int(w)) for name, w in zip(full.sizes, widths, strict=True)})


def random_widths(space: SearchSpace, count: int, rng: np.random.Generator) -> IntArray:
    """Random plans of a space, from small to whole, shape ``(count, groups of the network)``.

    Each has a keep ratio of its own, around which its groups scatter, and a number that its widths are multiples of
    where the space allows it: what a network gains from blocks shows when many layers have them.
    """
    names = list(space.full.sizes)
    sizes = np.array(list(space.full.sizes.values()))
    found = np.repeat(sizes[None], count, axis=0)
    means = rng.uniform(0.1, 1.0, (count, 1))
    wanted = np.clip(rng.normal(means, 0.2, found.shape), 0.0, 1.0) * sizes
    multiples = rng.choice(MULTIPLES, count)
    for multiple in MULTIPLES:
        rows, coarse = multiples == multiple, space.in_multiples(multiple)
        for name in space.names:
            column, allowed = names.index(name), np.array(coarse.allowed[name])
            found[rows, column] = allowed[np.abs(wanted[rows, column, None] - allowed).argmin(axis=1)]
    return found


def _whole(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    return {name: tuple(range(size)) for name, size in plan.sizes.items()}
