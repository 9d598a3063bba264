"""What a device is: one YAML file per device, the file name is its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_profiles.errors import DeviceError

HERE = Path(__file__).parent


class Tier(BaseModel):
    """How long to measure.

    Args:
        processes: fresh processes; process-to-process offsets outlast any number of iterations.
        warmup: untimed calls per model, at least; more follow until calls are steady.
        max_warmup_seconds: seconds of warm-up after which timing begins anyway.
        min_repeats: timed calls per model, at least.
        min_seconds: seconds of interleaved timed calls per process, at least.
        max_seconds: seconds after which a process stops even if ``min_repeats`` is not reached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(ge=1)
    warmup: int = Field(ge=0)
    min_repeats: int = Field(ge=3)
    min_seconds: float = Field(ge=0)
    max_seconds: float = Field(default=60.0, gt=0)
    max_warmup_seconds: float = Field(default=5.0, ge=0)


class Budgets(BaseModel):
    """Limits a model must meet on the device; None = no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_ms: float | None = Field(default=None, gt=0)
    p95_ms: float | None = Field(default=None, gt=0)
    size_bytes: int | None = Field(default=None, gt=0)
    peak_rss_bytes: int | None = Field(default=None, gt=0)


class Multiples(BaseModel):
    """Per kind of layer, the multiple that its widths should have; in between, latency rises for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    conv: int = Field(default=8, ge=1)
    pointwise: int = Field(default=8, ge=1)
    depthwise: int = Field(default=8, ge=1)
    linear: int = Field(default=8, ge=1)


class DeviceProfile(BaseModel):
    """A target and the rules of measuring on it.

    Args:
        target: how the device is reached: a module of ``device_profiles.targets``.
        connect: that target's settings (``host`` ...); checked by its module's ``Settings``.
        provider: ONNX Runtime execution provider; a fallback to another one is an error, never silent.
        threads: intra-op threads; with one thread on a CPU, ratios come from CPU time (see ``measure``).
        channel_multiple: widths that are no multiple of it cost as much as the next multiple: one number, or one per
            kind of layer. ``secateur devices probe`` finds it.
        timing: False where times mean nothing (an emulator); such a device proves parity only.
        max_temperature_c: degrees Celsius above which a measurement does not count; None = the kernel's throttling
            signs alone decide.
        cool_down_s: seconds of rest before each process of the final tier.
        facts: what is known of the device (``cpu``, ``ram_mb``, ``isa`` ...), for people.
        sources: where the facts come from; ``unverified`` for those nobody has looked up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    target: str = "local"
    connect: dict[str, Any] = Field(default_factory=dict)
    provider: str = "CPUExecutionProvider"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)
    precision: Literal["fp32", "int8"] = "fp32"
    channel_multiple: Annotated[int, Field(ge=1)] | Multiples = 8
    timing: bool = True
    max_temperature_c: float | None = Field(default=None, gt=0)
    cool_down_s: float = Field(default=0.0, ge=0)
    facts: dict[str, Any] = Field(default_factory=dict)
    sources: tuple[str, ...] = ()
    search: Tier = Tier(processes=1, warmup=8, min_repeats=20, min_seconds=0.4)
    final: Tier = Tier(processes=7, warmup=8, min_repeats=50, min_seconds=0.5)
    budgets: Budgets = Budgets()

    @property
    def multiples(self) -> Multiples:
        """``channel_multiple`` per kind of layer."""
        if isinstance(self.channel_multiple, Multiples):
            return self.channel_multiple
        return Multiples(**dict.fromkeys(Multiples.model_fields, self.channel_multiple))

    def tier(self, name: Literal["search", "final"]) -> Tier:
        return self.search if name == "search" else self.final


def known_profiles(extra_dirs: Iterable[str | Path] = ()) -> dict[str, Path]:
    """Name -> file of every profile: the shipped ones, then ``extra_dirs`` (a later one of the same name wins)."""
    folders = [HERE, *(Path(folder) for folder in extra_dirs)]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def load_profile(name: str | Path, extra_dirs: Iterable[str | Path] = ()) -> DeviceProfile:
    """Read the profile called ``name``, or the file at ``name`` if it ends in ``.yaml``.

    Raises:
        DeviceError: no such profile (lists the known ones), or its file is not valid; lists every fault with its line.
    """
    known = known_profiles(extra_dirs)
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else known.get(str(name))
    if path is None:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DeviceError(
            f"unknown device profile {str(name)!r}.{hint} Known: {', '.join(sorted(known))}. "
            "A new device is a new YAML file; its file name is its name.",
            "profile",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"cannot read the device profile {path}: {error.strerror}", "profile") from error
    return _parse(text, path)


def _parse(text: str, path: Path) -> DeviceProfile:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DeviceError(f"{path} is not YAML: {error}", "profile") from error
    if not isinstance(data, dict):
        raise DeviceError(f"{path}: a device profile is a mapping of settings, got {type(data).__name__}", "profile")
    lines, faults = dict[str, int](), list[str]()
    for key, line in _keys(root):
        if key in lines:
            faults.append(f"line {line}: {key}: given a second time (first on line {lines[key]})")
        lines.setdefault(key, line)
    if data.pop("name", path.stem) != path.stem:
        faults.append(
            f"line {lines['name']}: name: must be the file name, {path.stem!r}; leave it out or rename the file"
        )
    try:
        profile = DeviceProfile(name=path.stem, **{str(key): value for key, value in data.items()})
    except ValidationError as error:
        faults += [_fault(detail, lines) for detail in error.errors()]
    if faults:
        raise DeviceError(f"invalid device profile {path}:\n  " + "\n  ".join(faults), "profile")
    return profile


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted name and line of every key, in file order."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _keys(value, f"{name}.")


def _fault(detail: Mapping[str, Any], lines: Mapping[str, int]) -> str:
    loc = [str(part) for part in detail["loc"]]
    key = ".".join(loc)
    line = lines.get(key) or lines.get(".".join(loc[:-1]))  # a missing key: the line of its section
    if detail["type"] == "extra_forbidden":
        section = DeviceProfile.model_fields if len(loc) == 1 else _section_fields(loc[0])
        close = difflib.get_close_matches(loc[-1], section, n=1)
        message = "unknown setting" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(section)}")
    else:
        got = detail.get("input")
        message = str(detail["msg"]) + ("" if detail["type"] == "missing" else f", got {got!r}")
    return f"line {line}: {key}: {message}" if line else f"{key}: {message}"


def _section_fields(section: str) -> Iterable[str]:
    return (Budgets if section == "budgets" else Tier).model_fields
