"""What a device is: one YAML file per device, the file name is its name.

A profile may be based on another one, ``extends: NAME``: what it says itself wins, nested settings merge, facts and
sources are inherited.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PydanticUserError,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from secateur.device_profiles import plain_yaml
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.plain_yaml import Content, Document, Place, Plain
from secateur.device_profiles.settle import Schema, schema_of, settle
from secateur.device_profiles.shelf import NotAdmittedError, PluginError, Shelf, in_file
from secateur.device_profiles.wording import printable, shown

BOARDS = Path(__file__).with_name("boards")
TARGETS = Shelf("secateur.device_profiles.targets", "target", ("Settings", "open_target"), "secateur.targets")
"""The kinds of target, named as their modules."""
RUNTIMES = Shelf(
    "secateur.device_profiles.runtimes",
    "runtime",
    ("FORMAT", "facts", "load", "inputs", "outputs", "run"),
    "secateur.runtimes",
)
"""What networks run with on a device, named as their modules."""
NOT_SETTINGS = ("extends",)
log = logging.getLogger(__name__)
"""Keys of a file that say where its settings come from."""


class Tier(BaseModel):
    """How long to measure.

    Args:
        processes: fresh processes; process-to-process offsets outlast any number of iterations. Under three, a ratio
            is a point estimate without an interval.
        max_processes: how many there may be where a comparison is still undecided after ``processes``.
        warmup: untimed calls per model, at least; more follow until calls are steady.
        max_warmup_seconds: seconds of warm-up after which timing begins anyway.
        min_repeats: timed calls per model, at least.
        min_seconds: seconds of interleaved timed calls per process, at least.
        max_seconds: seconds after which a process stops even if ``min_repeats`` is not reached.
        strict: whether a busy or drifting device spoils a process, as throttling always does.
        retries: spoiled processes that are measured again, at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(ge=1, le=1000)
    max_processes: int = Field(default=0, ge=0, le=10_000)
    warmup: int = Field(ge=0, le=1_000_000)
    min_repeats: int = Field(ge=3, le=1_000_000)
    min_seconds: float = Field(ge=0, le=86_400)
    max_seconds: float = Field(default=60.0, gt=0, le=86_400)
    max_warmup_seconds: float = Field(default=5.0, ge=0, le=86_400)
    strict: bool = False
    retries: int = Field(default=2, ge=0, le=1000)

    @model_validator(mode="after")
    def _ends_after_its_least(self) -> Tier:
        if self.max_seconds < self.min_seconds:
            raise ValueError(
                f"max_seconds ({self.max_seconds:g}) ends a process before min_seconds ({self.min_seconds:g}); raise it"
            )
        return self


class Budgets(BaseModel):
    """Limits a model must meet on the device; None = no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_ms: float | None = Field(default=None, gt=0, le=1e9)
    p95_ms: float | None = Field(default=None, gt=0, le=1e9)
    size_bytes: int | None = Field(default=None, gt=0, le=2**50)
    peak_rss_bytes: int | None = Field(default=None, gt=0, le=2**50)


class Multiples(BaseModel):
    """Per kind of layer, the multiple that its widths should have; in between, latency rises for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    conv: int = Field(default=8, ge=1, le=65_536)
    pointwise: int = Field(default=8, ge=1, le=65_536)
    depthwise: int = Field(default=8, ge=1, le=65_536)
    linear: int = Field(default=8, ge=1, le=65_536)


def _number_or_mapping(value: object) -> str:
    return "per kind" if isinstance(value, Mapping | Multiples) else "number"


ChannelMultiple = Annotated[
    Annotated[int, Field(ge=1, le=65_536), Tag("number")] | Annotated[Multiples, Tag("per kind")],
    Discriminator(_number_or_mapping),
]


class DeviceProfile(BaseModel):
    """A target and the rules of measuring on it.

    Args:
        target: how the device is reached: a module of ``secateur.device_profiles.targets``.
        connect: that target's settings (``host`` ...); checked by its module's ``Settings``.
        runtime: what networks run with there: a module of ``secateur.device_profiles.runtimes``.
        provider: the runtime's execution provider; a fallback to another one is an error, never silent.
        threads: intra-op threads; with one thread on a CPU, ratios come from CPU time (see ``measure``).
        channel_multiple: widths that are no multiple of it cost as much as the next multiple: one number, or one per
            kind of layer. ``secateur devices probe`` finds it.
        timing: False where times mean nothing (an emulator); such a device proves parity only.
        max_temperature_c: degrees Celsius above which a measurement does not count; None = the kernel's throttling
            signs alone decide.
        cool_down_s: seconds of rest before each process of the final tier.
        facts: what is known of the device (``arch``, ``cpu``, ``ram_mb``, ``isa`` ...), for people; only ``arch`` is
            compared with the device. ``unverified`` lists those that nobody has looked up.
        sources: where the facts come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    target: str = "local"
    connect: dict[str, Any] = Field(default_factory=dict)
    runtime: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    threads: int = Field(default=1, ge=1, le=1024)
    batch: int = Field(default=1, ge=1, le=65_536)
    channel_multiple: ChannelMultiple = 8
    timing: bool = True
    max_temperature_c: float | None = Field(default=None, gt=0, le=1000)
    cool_down_s: float = Field(default=0.0, ge=0, le=86_400)
    facts: dict[str, Any] = Field(default_factory=dict)
    sources: tuple[str, ...] = ()
    search: Tier = Tier(processes=1, warmup=8, min_repeats=20, min_seconds=0.4)
    final: Tier = Tier(processes=7, max_processes=28, warmup=8, min_repeats=50, min_seconds=0.5, strict=True, retries=5)
    budgets: Budgets = Budgets()

    @field_validator("final", mode="before")
    @classmethod
    def _strict_unless_it_says_otherwise(cls, value: Any) -> Any:
        return {"strict": True, "retries": 5, "max_processes": 28, **value} if isinstance(value, dict) else value

    @property
    def multiples(self) -> Multiples:
        """``channel_multiple`` per kind of layer."""
        if isinstance(self.channel_multiple, Multiples):
            return self.channel_multiple
        return Multiples(**dict.fromkeys(Multiples.model_fields, self.channel_multiple))

    def tier(self, name: Literal["search", "final"]) -> Tier:
        """How long to measure: a candidate, or the last timing."""
        return self.search if name == "search" else self.final


def known_profiles(extra_dirs: Iterable[str | Path] = ()) -> dict[str, Path]:
    """Name -> file of every profile: the shipped ones, then ``extra_dirs`` (a later one of the same name wins)."""
    return {name: paths[-1] for name, paths in _all_profiles(extra_dirs).items()}


def load_profile(name: str | Path, extra_dirs: Iterable[str | Path] = ()) -> DeviceProfile:
    """Read the profile called ``name``, or the file at ``name`` if it ends in ``.yaml``.

    Raises:
        DeviceError: no such profile (lists the known ones), its file or one it extends is not valid (lists every fault
            with its line), or profiles extend each other in a circle.
    """
    if not str(name).endswith((".yaml", ".yml")):
        files = _all_profiles(extra_dirs)
        if str(name) not in files:
            raise DeviceError(
                f"unknown device profile {_unknown(str(name), files)} "
                "A new device is a new YAML file; its file name is its name.",
                "profile",
            )
        return _load(files[str(name)][-1], files, ())
    path = Path(name)
    return _load(path, _all_profiles([*extra_dirs, path.parent]), ())


def _all_profiles(folders: Iterable[str | Path]) -> dict[str, list[Path]]:
    """Name -> every file of that name, in the order in which later ones hide earlier ones."""
    files: dict[str, list[Path]] = {}
    for folder in dict.fromkeys([BOARDS, *(Path(f).absolute() for f in folders)]):
        for path in sorted(folder.glob("*.yaml")):
            files.setdefault(path.stem, []).append(path)
    return files


def _unknown(name: str, known: Iterable[str], what: str = "Known") -> str:
    """``'lokal'. Did you mean 'local'? Known: ...``"""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{name!r}.{hint} {what}: {', '.join(names)}."


def _load(path: Path, profiles: Mapping[str, list[Path]], chain: tuple[Path, ...]) -> DeviceProfile:
    """Read a file and those it extends; ``chain`` are the files that led to it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"cannot read the device profile {path}: {error.strerror}", "profile") from error
    except UnicodeDecodeError as error:
        raise DeviceError(f"{path} is not a text file in UTF-8: {error}", "profile") from error
    document = _read(text, path)
    content, lines = dict(document.content), {_dotted(place): line for place, line in document.lines.items()}
    faults = [
        f"line {places[-1]}: {_dotted(place)}: given a second time (first on line {places[0]})"
        for place, places in document.repeated.items()
    ]
    base = None
    if "extends" in content:
        try:
            base = _base(_written(content["extends"]), path, profiles, (*chain, path.absolute()))
        except DeviceError as error:
            faults.append(f"line {lines['extends']}: extends: {error}")
            raise _invalid(path, faults) from error
    data, misread = settle(content, _schemas(_written(content.get("target", base.target if base else "local"))))
    faults += [_at(_dotted(fault.place), fault.message, lines) for fault in misread]
    if data.pop("name", path.stem) != path.stem:
        faults.append(_at("name", f"must be the file name, {path.stem!r}; leave it out or rename the file", lines))
    data.pop("extends", None)
    if data.pop("precision", None) is not None:
        _say_ignored(path)
    _place_files(data, path.absolute().parent)
    settings = _inherited(base, data) if base else data
    told = {_dotted(fault.place) for fault in misread}
    profile = None
    try:
        profile = DeviceProfile(**{**settings, "name": path.stem})
    except ValidationError as error:
        faults += [_fault(detail, lines) for detail in error.errors() if _key(detail["loc"]) not in told]
    faults += _connect_faults(settings, lines, told) + _runtime_faults(settings, lines)
    if faults or profile is None:
        raise _invalid(path, faults)
    return profile


@functools.cache
def _say_ignored(path: Path) -> None:
    """Tell of a key of earlier profiles, once a process."""
    log.warning(
        "Note: %s: precision is ignored; what ships is said by the run file's precision. Delete the line: it is read "
        "in this release only.",
        path,
    )


def _place_files(data: dict[str, Any], folder: Path) -> None:
    """Give the files of code that a profile names their absolute paths: whoever extends it may lie elsewhere."""
    for key in ("target", "runtime"):
        if parts := in_file(data.get(key)):
            data[key] = f"{folder / parts[0]}:{parts[1]}"


def _invalid(path: Path, faults: list[str]) -> DeviceError:
    return DeviceError(f"invalid device profile {path}:\n  " + "\n  ".join(faults), "profile")


def _read(text: str, path: Path) -> Document:
    """A file that holds a mapping."""
    try:
        document = plain_yaml.read(text)
    except yaml.YAMLError as error:
        raise DeviceError(f"{path} is not YAML: {error}", "profile") from error
    if not isinstance(document.content, dict):
        kind = type(document.content.value if isinstance(document.content, Plain) else document.content)
        raise DeviceError(f"{path}: a device profile is a mapping of settings, got {kind.__name__}", "profile")
    return document


def _schemas(target: str) -> dict[Place, Schema | None]:
    """What the places of a profile take."""
    own = schema_of(DeviceProfile)
    properties = {**own["properties"], **{key: {"type": "string"} for key in (*NOT_SETTINGS, "precision")}}
    try:
        connect = schema_of(TARGETS.load(target).Settings)
    except (ValueError, PydanticUserError):  # told with the other faults
        connect = None
    return {(): {**own, "properties": properties}, ("connect",): connect}


def _written(content: Content) -> str:
    return content.written if isinstance(content, Plain) else str(content)


def _dotted(place: Sequence[str | int]) -> str:
    return ".".join(map(str, place))


def _base(name: object, path: Path, profiles: Mapping[str, list[Path]], chain: tuple[Path, ...]) -> DeviceProfile:
    """The profile that ``path`` extends. One that extends its own name means the one that it hides."""
    files = profiles.get(str(name), [])
    if str(name) == path.stem:
        hidden = [file.absolute() for file in files]
        files = files[: hidden.index(path.absolute())] if path.absolute() in hidden else files
        if not files:
            raise DeviceError(f"the profile {str(name)!r} extends itself; name another one", "profile")
    if not files:
        raise DeviceError(f"unknown device profile {_unknown(str(name), profiles)}", "profile")
    if files[-1].absolute() in chain:
        circle = " -> ".join(file.stem for file in (*chain[chain.index(files[-1].absolute()) :], files[-1]))
        raise DeviceError(f"{circle} is a circle; one of them must stand on its own", "profile")
    return _load(files[-1], profiles, chain)


def _inherited(base: DeviceProfile, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``base`` with those of a profile that extends it."""
    settings = base.model_dump()
    if isinstance(own.get("channel_multiple"), Mapping):
        settings["channel_multiple"] = base.multiples.model_dump()
    if own.get("target", base.target) != base.target:  # one target's settings mean nothing to another
        settings["connect"] = {}
    merged = _merged(settings, own)
    if isinstance(own.get("sources"), list):
        merged["sources"] = [*base.sources, *(s for s in own["sources"] if s not in base.sources)]
    return merged


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in own.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if nested else value
    return result


def _connect_faults(settings: Mapping[str, Any], lines: Mapping[str, int], told: Collection[str]) -> list[str]:
    """What the module of the target has against the ``connect`` section."""
    target, connect = settings.get("target", "local"), settings.get("connect", {})
    if not isinstance(target, str) or not isinstance(connect, Mapping) or "target" in told:
        return []  # said elsewhere
    if faults := _shelf_faults(TARGETS, target, lines):
        return faults
    if not TARGETS.has(target):
        return []  # a file that there is no consent for so far: ``open_target`` checks
    model: Any = TARGETS.load(target).Settings
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return [_at("target", f"the Settings of target {target} are no pydantic model", lines)]
    try:
        model.model_validate(dict(connect))
    except ValidationError as error:
        # A setting that is missing makes it a template; whoever uses it says so.
        details = [detail for detail in error.errors() if detail["type"] != "missing" or len(detail["loc"]) > 1]
        placed = {_dotted(("connect", *d["loc"])): {**d, "loc": ("connect", *d["loc"])} for d in details}
        known = list(model.model_fields)
        return [_fault(detail, lines, known) for place, detail in placed.items() if place not in told]
    return []


def _runtime_faults(settings: Mapping[str, Any], lines: Mapping[str, int]) -> list[str]:
    """What speaks against the runtime's name."""
    runtime = settings.get("runtime", "onnxruntime")
    return _shelf_faults(RUNTIMES, runtime, lines) if isinstance(runtime, str) else []


def _shelf_faults(shelf: Shelf, name: str, lines: Mapping[str, int]) -> list[str]:
    """What speaks against the name of a target or runtime; nothing where it is a file without consent so far."""
    try:
        shelf.load(name)
    except NotAdmittedError:
        return []
    except PluginError as error:
        return [_at(shelf.kind, str(error), lines)]
    except ValueError:
        return [_at(shelf.kind, f"unknown {shelf.kind} {_unknown(name, shelf.names())}", lines)]
    return []


def _key(loc: Sequence[str | int]) -> str:
    """The dotted key of a fault of pydantic's, which names the form of ``channel_multiple`` too."""
    return _dotted([loc[0], *loc[2:]] if loc[0] == "channel_multiple" else loc)


def _fault(detail: Mapping[str, Any], lines: Mapping[str, int], known: Iterable[str] | None = None) -> str:
    """One fault of pydantic's in our words.

    Args:
        known: the settings of the section the fault is in; None = those of the profile's own sections.
    """
    loc = [str(part) for part in detail["loc"]]
    if loc[0] == "channel_multiple":
        return _at(_key(loc), _multiple_fault(detail), lines)
    if detail["type"] == "extra_forbidden":
        names = list(_section_fields(loc) if known is None else known)
        close = difflib.get_close_matches(loc[-1], names, n=1)
        message = "unknown setting" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}")
    else:
        message = str(detail["msg"]).removeprefix("Value error, ")
        message += "" if detail["type"] in ("missing", "value_error") else f", got {shown(detail.get('input'))}"
    return _at(".".join(loc), message, lines)


def _at(key: str, message: str, lines: Mapping[str, int]) -> str:
    line = lines.get(key) or lines.get(key.rpartition(".")[0])  # a missing key: the line of its section
    return f"line {line}: {printable(key)}: {message}" if line else f"{printable(key)}: {message}"


def _multiple_fault(detail: Mapping[str, Any]) -> str:
    kinds = list(Multiples.model_fields)
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(detail["loc"][-1]), kinds, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(kinds)}"
        return f"unknown kind of layer; {hint}"
    whole = "" if len(detail["loc"]) > 2 else f", or one per kind of layer ({', '.join(kinds)})"
    return f"must be a whole number from 1{whole}, got {shown(detail.get('input'))}"


def _section_fields(loc: list[str]) -> Iterable[str]:
    """The names a key at this place can have."""
    sections: dict[str, type[BaseModel]] = {"budgets": Budgets, "search": Tier, "final": Tier}
    if len(loc) == 1:
        return [*DeviceProfile.model_fields, *NOT_SETTINGS]
    return sections[loc[0]].model_fields
