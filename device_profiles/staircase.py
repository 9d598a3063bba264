"""How latency steps with width on a device: found by timing small networks, one channel more at a time.

Kernels work on blocks of channels. A width between two blocks costs as much as the next one, or more: on x86 with
AVX-512 a 3 x 3 convolution of 17 channels takes twice the time of one of 16. Where the steps lie depends on the device,
the runtime, the thread count and the precision, so they are measured, and the search is given only widths that pay.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.layers import KINDS, LayerKind
from secateur.device_profiles.measure import BenchmarkResult, measure
from secateur.device_profiles.profile import DeviceProfile, Multiples, Tier
from secateur.device_profiles.runtime import DEFAULT, runtime_named
from secateur.device_profiles.target import Target
from secateur.device_profiles.wording import number_of

WIDTHS = tuple(range(33, 65))
"""Wide enough that a layer takes longer than its call, and two widths of the largest multiple: one would not do."""
MULTIPLES = (1, 2, 4, 8, 16)
SLACK = 0.02
"""A larger multiple is preferred where rounding up to it costs no more than this on the mean."""
FLOAT = "fp32"
"""The precision that is meant where none is named."""
FINGERPRINT_KEYS = ("board", "cpu", "machine", "cpus", "onnxruntime", "freq_max_mhz")


@dataclass(frozen=True)
class Staircase:
    """What a probe found.

    Args:
        profile: the profile's name.
        fingerprint: of device, runtime and settings (``fingerprint_of``); another one needs another probe.
        multiples: per kind of layer, the multiple its widths should have.
        curves: kind -> width -> median ms of a small network of such layers.
        losses: kind -> multiple -> mean extra latency (fraction) of rounding a width up to it, against the best width
            that is at least as large.
        noise_floor: half-width of the 95 % interval of a network against itself; None = not taken.
        environment: the device as the agent described it.
        created: seconds since 1970.
        precision: that the networks were timed in.
    """

    profile: str
    fingerprint: str
    multiples: Multiples
    curves: Mapping[LayerKind, Mapping[int, float]]
    losses: Mapping[LayerKind, Mapping[int, float]]
    noise_floor: float | None
    environment: Mapping[str, Any]
    created: float
    precision: str = FLOAT

    def summary(self) -> list[tuple[str, str]]:
        """Rows (kind, what was found) for people."""
        rows: list[tuple[str, str]] = []
        for kind, curve in self.curves.items():
            multiple, losses = getattr(self.multiples, kind), self.losses[kind]
            worst = max(curve, key=lambda width: curve[width] / _best(curve)[width])
            excess = curve[worst] / _best(curve)[worst]
            cheap = min(width for width in curve if width >= worst and curve[width] <= _best(curve)[worst] * 1.0001)
            text = f"multiples of {multiple}"
            if excess > 1 + SLACK:
                text += f"; {number_of(worst, 'channel(s) takes|take')} {excess:.2f}x the time of {cheap}"
            if multiple > 1:
                text += f"; any width costs {losses[1]:.0%} more than the best at least as wide"
            rows.append((kind, text))
        if self.noise_floor is not None:
            rows.append(("noise", f"a network against itself: +-{self.noise_floor:.1%} in one measurement"))
        return rows

    def to_json(self) -> str:
        return json.dumps({"format": 1, **asdict(self), "multiples": self.multiples.model_dump()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            DeviceError: the text is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != 1:
                raise ValueError("unknown format")
            numbered = {
                key: {kind: {int(n): float(v) for n, v in row.items()} for kind, row in data.pop(key).items()}
                for key in ("curves", "losses")
            }
            return cls(**{**data, **numbered, "multiples": Multiples(**data["multiples"])})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DeviceError(f"not a probe written by Staircase.to_json: {error!r}", "profile") from error


def fingerprint_of(profile: DeviceProfile, answer: Mapping[str, Any], precision: str = FLOAT) -> str:
    """16 hexadecimal digits that name device, runtime, settings and precision.

    Args:
        answer: of ``Target.prepare`` (``device`` and ``runtime``), or the environment of a measurement.
        precision: of the networks that were timed, with the number types where there are several.
    """
    facts = {**answer.get("device", {}), **answer.get("runtime", {}), **answer}
    name = runtime_named(profile.runtime).name
    known = {key: facts[key] for key in (*FINGERPRINT_KEYS, name) if key in facts}
    settings = [profile.provider, profile.threads, precision, profile.batch, profile.target.rpartition(":")[2]]
    settings += [] if profile.runtime == DEFAULT else [name]
    return hashlib.sha256(json.dumps([known, settings], sort_keys=True).encode()).hexdigest()[:16]


def probe(
    target: Target,
    profile: DeviceProfile,
    *,
    seconds: float = 90.0,
    progress: Callable[[int, int, str], None] | None = None,
    kinds: Sequence[LayerKind] = KINDS,
    widths: Sequence[int] = WIDTHS,
    precision: str = FLOAT,
    scheme: str = "",
) -> Staircase:
    """Time small networks of every kind of layer at neighbouring widths, interleaved, and read the steps off.

    Args:
        seconds: of timed calls on the device, at most; loading comes on top.
        progress: called with (steps done, steps in all, what was found).
        precision: of the networks.
        scheme: its number types, as ``U8S8``; empty = floats.

    Raises:
        DeviceError: the profile is an emulator's, or whatever the target reports.
    """
    if not profile.timing:
        raise DeviceError(f"device profile {profile.name} is emulated (timing: false): it has no latency", "profile")
    from secateur.device_profiles.chains import chain  # makes ONNX files; what only reads a probe needs none

    answer = target.prepare()
    share = seconds / (len(kinds) + 1)
    tier = Tier(processes=1, warmup=3, min_repeats=30, min_seconds=min(2.0, share), max_seconds=share)
    curves: dict[LayerKind, dict[int, float]] = {}
    steps = len(kinds) + 1
    with tempfile.TemporaryDirectory(prefix="secateur-probe-") as folder:
        for done, kind in enumerate(kinds):
            files = {}
            for width in widths:
                files[str(width)] = Path(folder, f"{kind}-{width}.onnx")
                files[str(width)].write_bytes(chain(kind, width, scheme).SerializeToString())
            result = measure(target, profile, files, tier)
            curves[kind] = {width: _typical_ms(result, str(width)) for width in widths}
            if progress:
                progress(done + 1, steps, f"{kind}: multiples of {step_of(curves[kind])}")
        floor = noise_floor(target, profile, Path(folder, f"{kinds[0]}-{max(widths)}.onnx"))
    if progress:
        progress(steps, steps, f"noise +-{floor:.1%}")
    multiples = dict.fromkeys(Multiples.model_fields, 1) | {kind: step_of(curve) for kind, curve in curves.items()}
    losses = {kind: losses_of(curve) for kind, curve in curves.items()}
    return Staircase(
        profile.name,
        fingerprint_of(profile, answer, setting_of(precision, scheme)),
        Multiples(**multiples),
        curves,
        losses,
        floor,
        {**answer.get("device", {}), **answer.get("runtime", {})},
        time.time(),
        precision,
    )


def setting_of(precision: str, scheme: str) -> str:
    """What a fingerprint says of a precision: its name, and its number types where there are several."""
    return f"{precision} {scheme}".strip()


def noise_floor(target: Target, profile: DeviceProfile, model: Path, copies: int = 4, processes: int = 3) -> float:
    """Half-width (fraction, 95 %) of the ratio of a network to itself in one measurement of the search tier.

    The network is timed beside copies of itself in several processes; how their medians scatter within a process is
    what a real difference must exceed.
    """
    tier = profile.search.model_copy(update={"processes": processes})
    result = measure(target, profile, {f"copy {i}": model for i in range(copies)}, tier)
    kind = f"{result.statistic}_ms"
    medians = np.log([[np.median(getattr(p.models[n], kind)) for n in result.names] for p in result.processes])
    variance = float(medians.var(axis=1, ddof=1).mean())
    return float(1.96 * np.sqrt(2 * variance))


def step_of(curve: Mapping[int, float]) -> int:
    """The multiple that widths should have: the largest one that loses no more than the best one (and ``SLACK``)."""
    losses = losses_of(curve)
    least = min(losses.values())
    return max(multiple for multiple, loss in losses.items() if loss <= least + SLACK)


def losses_of(curve: Mapping[int, float]) -> dict[int, float]:
    """Multiple -> mean extra latency of rounding every width up to it, against the best width at least as wide.

    Args:
        curve: neighbouring widths -> latency; the largest width is a multiple of all multiples considered.
    """
    top, best = max(curve), _best(curve)
    return {
        m: float(np.mean([curve[-(-width // m) * m] / best[width] for width in curve])) - 1
        for m in MULTIPLES
        if top % m == 0
    }


def _best(curve: Mapping[int, float]) -> dict[int, float]:
    """Width -> the lowest latency of a width at least as large."""
    widths = sorted(curve)
    lowest = np.minimum.accumulate([curve[width] for width in reversed(widths)])[::-1]
    return dict(zip(widths, lowest.tolist(), strict=True))


def _typical_ms(result: BenchmarkResult, name: str) -> float:
    """Lower quartile of the time that decides (CPU time where it tells, else wall time): other work only adds to it."""
    times = result.cpu_ms(name) if result.statistic == "cpu" else result.wall_ms(name)
    return float(np.percentile(times, 25))
