"""What an agent's answer may say: the whole of it is checked, field by field, before any of it counts.

A device is not trusted: it may be broken, of another version, or somebody else's. Fields that a newer agent adds are
kept as facts, within the same bounds as all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from secateur.device_profiles.errors import DeviceError

MAX_CALLS, MAX_NODES, MAX_DIMS = 10_000_000, 100_000, 32
MAX_DEPTH, MAX_ITEMS, MAX_TEXT = 8, 1_000_000, 10_000
MAX_MS, MAX_BYTES = 1e9, 2**50


def _fact(value: Any) -> Any:
    """A value of JSON within the bounds: finite numbers, texts without control characters, few levels and items."""
    left, rest = MAX_ITEMS, [(value, 0)]
    while rest:
        part, depth = rest.pop()
        left -= 1
        if depth > MAX_DEPTH or left < 0:
            raise ValueError("nested too deeply or too long")
        if isinstance(part, str):
            if len(part) > MAX_TEXT or not part.replace("\n", " ").replace("\t", " ").isprintable():
                raise ValueError("a text with control characters, or one too long")
        elif isinstance(part, dict):
            rest += [(key, depth + 1) for key in part] + [(item, depth + 1) for item in part.values()]
        elif isinstance(part, list | tuple):
            rest += [(item, depth + 1) for item in part]
        elif isinstance(part, float):
            if not math.isfinite(part):
                raise ValueError("a number that is none")
        elif isinstance(part, int):
            if abs(part) > 2**63:
                raise ValueError("a number too large")
        elif part is not None:
            raise ValueError(f"a value of type {type(part).__name__}")
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Number = Annotated[float, Field(allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=MAX_MS, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0, le=MAX_BYTES)]
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_fact)]
Fact = Annotated[Any, AfterValidator(_fact)]
Facts = Annotated[dict[str, Any], AfterValidator(_fact)]
Shape = Annotated[
    tuple[Annotated[int, Field(ge=0, le=2**40)], ...], Field(max_length=MAX_DIMS), BeforeValidator(_tuple)
]
Shapes = Annotated[tuple[Shape, ...], Field(max_length=1000), BeforeValidator(_tuple)]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="after")
    def _facts_are_bounded(self) -> _Answer:
        _fact(self.model_extra or {})
        return self


class NodeAnswer(_Answer):
    """One operator of a profile."""

    name: Text
    op: Text
    ms: Milliseconds
    input_shapes: Shapes = ()
    output_shapes: Shapes = ()


class SecondAnswer(_Answer):
    """A second of a sustained run."""

    t_s: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    calls: Annotated[int, Field(ge=1, le=MAX_CALLS)]
    p50_ms: Milliseconds
    p95_ms: Milliseconds


class SamplesAnswer(_Answer):
    """One model's raw numbers."""

    wall_ms: Annotated[
        tuple[Annotated[float, Field(gt=0, le=MAX_MS, allow_inf_nan=False)], ...],
        Field(min_length=1, max_length=MAX_CALLS),
        BeforeValidator(_tuple),
    ]
    cpu_ms: Annotated[tuple[Milliseconds, ...], Field(min_length=1, max_length=MAX_CALLS), BeforeValidator(_tuple)]
    load_ms: Milliseconds
    first_ms: Milliseconds
    output_sha256: Text
    peak_rss_bytes: Bytes | None = None
    warmup_calls: Annotated[int, Field(ge=0, le=MAX_CALLS)] | None = None
    steady: bool | None = None
    energy_mj: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] | None = None
    precision_asked: Text | None = None
    precision_used: Text | None = None
    nodes: Annotated[tuple[NodeAnswer, ...], Field(max_length=MAX_NODES), BeforeValidator(_tuple)] = ()
    sustained: Annotated[tuple[SecondAnswer, ...], Field(max_length=MAX_NODES), BeforeValidator(_tuple)] = ()

    @model_validator(mode="after")
    def _as_long(self) -> SamplesAnswer:
        if len(self.wall_ms) != len(self.cpu_ms):
            raise ValueError(f"{len(self.wall_ms)} wall and {len(self.cpu_ms)} CPU times")
        return self


class TelemetryAnswer(_Answer):
    """The device's state at one moment."""

    phase: Text | None = None
    freq_mhz: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None


class HeatAnswer(_Answer):
    """Temperatures while it measured, degrees Celsius."""

    max: Number | None = None


class EnvironmentAnswer(_Answer):
    """The device around a measurement."""

    cpu_pressure: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    temperature_c: HeatAnswer | Number | None = None
    throttled: bool | Annotated[int, Field(ge=0, le=2**32)] | None = None
    clock_jump_s: Number = 0.0
    telemetry: Annotated[tuple[TelemetryAnswer, ...], Field(max_length=MAX_CALLS), BeforeValidator(_tuple)] = ()


class BenchmarkAnswer(_Answer):
    """The answer to ``benchmark``: one fresh process."""

    models: dict[str, SamplesAnswer]
    environment: EnvironmentAnswer
    started: Number
    ended: Number


class RuntimeAnswer(_Answer):
    """ONNX Runtime as the device has it."""

    onnxruntime: Text | None = None
    providers: Annotated[tuple[Text, ...], Field(max_length=1000), BeforeValidator(_tuple)] = ()


class ProbeAnswer(_Answer):
    """The answer to ``probe``; ``host`` is the machine's name, for people who look whether it is the right one."""

    host: Text | None = None
    device: Facts
    runtime: RuntimeAnswer
    limits: Facts = Field(default_factory=dict)
    now: Facts = Field(default_factory=dict)


class InferAnswer(_Answer):
    """The answer to ``infer``: where the outputs lie on the device."""

    outputs: Annotated[Text, Field(min_length=1)]


Texts = Annotated[tuple[Text, ...], Field(max_length=MAX_CALLS), BeforeValidator(_tuple)]


class ResultHead(_Answer):
    """A written measurement, but for its processes."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    profile: Text
    tier: Text
    names: Annotated[Texts, Field(min_length=1)]
    sha256: dict[str, Text]
    statistic: Literal["cpu", "wall"]
    seed: Annotated[int, Field(ge=0, le=2**63)] = 0
    noise_floor: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    max_temperature_c: Number | None = None
    spoiled: Texts = ()
    disturbed: Texts = ()


A = TypeVar("A", bound=_Answer)
_KINDS: Mapping[str, type[_Answer]] = {"benchmark": BenchmarkAnswer, "probe": ProbeAnswer, "infer": InferAnswer}


def parse(kind: type[A], raw: Any) -> A:
    """An answer, checked.

    Raises:
        DeviceError: a field is missing, of another type or out of its bounds (code ``bad-answer``).
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'][:6])) or 'the answer'}: {e['msg']}" for e in error.errors()[:3]]
        more = f" and {error.error_count() - 3} more" if error.error_count() > 3 else ""
        said = "".join(c if c.isprintable() else "?" for c in "; ".join(faults))[:1000]
        raise DeviceError(f"the device gave an answer that is none: {said}{more}", "bad-answer") from error
    except RecursionError as error:
        raise DeviceError("the device gave an answer that is nested too deeply", "bad-answer") from error


def checked(op: str, raw: Any) -> Any:
    """An agent's answer as it came, after all of it was checked; operations without a schema must be mappings.

    Raises:
        DeviceError: it is no answer to this operation (code ``bad-answer``).
    """
    parse(_KINDS.get(op, _Answer), raw)
    return raw
