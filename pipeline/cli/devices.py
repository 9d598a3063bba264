"""``secateur devices``: which devices there are, whether one is ready, and how fast a model is on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.padding import Padding
from rich.text import Text
from typer.core import TyperCommand

from pipeline import errors
from pipeline.cli.trust import Trust, consent_to_profile
from pipeline.terminal import command, err, one_line, out, table

if TYPE_CHECKING:
    from device_profiles import BenchmarkResult, DeviceProfile, Target
    from device_profiles.check import Check
    from device_profiles.measure import FloatArray
    from device_profiles.staircase import Staircase
    from device_profiles.target import AddOption

app = typer.Typer(
    name="devices",
    help="The devices a model can be timed on: list, add and check them, probe their steps, time a model.",
    epilog="A new board: 'secateur devices add kitchen --from raspberry-pi-5 --host pi@192.168.1.20', "
    "then 'secateur devices probe kitchen', then device: {profile: kitchen} in the run file.",
    no_args_is_help=True,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A device profile; `secateur devices list` names them.")]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
GIVEN = "secateur.devices.add"
"""Where a command's context keeps the options of the kinds of target."""
PARITY_TOLERANCE = 1e-4
PARITY_TIMEOUT_S = 900.0
"""An emulator takes minutes where the device takes milliseconds."""
LONG = 120
LONGEST_S = 86_400
"""A measurement takes a day at most."""
MARKS = {"ok": "green", "warning": "yellow", "missing": "bold red"}
"""Status of a check -> its colour."""
FLAGS = {
    "contended": "other programs used the processor: ratios hold, milliseconds are too long",
    "drift": "the device became slower or faster meanwhile: let it rest and measure again",
    "throttled": "the device slowed its clocks down or was too hot: cool it, or give it a better power supply",
    "clock-jump": "the device's clock was set meanwhile: latencies hold, dates do not",
    "unstable": "measured again as often as the tier allows, and still disturbed",
}


# ---------------------------------------------------------------------------------------------------- list and show


@app.command(name="list")
def list_(json_: Json = False) -> None:
    """List the devices that can be used, and the templates a device can be made of.

    Example: secateur devices list --json
    """
    from device_profiles.target import adding, needs

    entries = [_entry(name, path) for name, path in sorted(_known().items())]
    if json_:
        out.data([{key: value for key, value in entry.items() if key != "profile"} for entry in entries])
        return
    columns = ("name", "target", "host", "provider", "threads", "calibrated")
    devices = [entry for entry in entries if not entry["template"]]
    rows = [columns, *(_cells(entry) for entry in devices)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for i, row in enumerate(rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        out.print(line, style="bold" if i == 0 else None)
        if i:
            out.print(Padding(one_line(_describe(devices[i - 1])), (0, 0, 0, 4)))
    templates = [entry for entry in entries if entry["template"]]
    if templates:
        adds = dict.fromkeys(
            f"each needs {needs(entry['profile'])}:\n  {adding(entry['profile'], 'THIS')}" for entry in templates
        )
        out.print("\ntemplates, " + "\n  or ".join(adds), style="bold")
        listed = table("", "", box=None, show_header=False)
        for entry in templates:
            listed.add_row(entry["name"], entry["description"])
        out.print(listed)


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """A device's line in ``devices list``."""
    if entry["fault"]:
        return (entry["name"], *("-" * 5))
    provider, threads = entry["provider"].removesuffix("ExecutionProvider"), str(entry["threads"])
    calibrated = "yes" if entry["calibrated"] else "no"
    return entry["name"], entry["target"], entry["host"] or "-", provider, threads, calibrated


@app.command()
def show(name: Name) -> None:
    """Show a device profile with all its settings, those it inherits included, as YAML.

    Example: secateur devices show raspberry-pi-5
    """
    from device_profiles import plain_yaml
    from device_profiles.target import adding, is_template, needs

    profile, path = _load(name), _known().get(name, Path(name))
    notes = [f"# {path}"]
    if is_template(profile):
        notes.append(f"# needs {needs(profile)}: {adding(profile)}")
    if _calibrated(profile.name):
        notes.append(f"# calibrated: {_probe_file(profile.name)}")
    else:
        notes.append(f"# not calibrated: {command('secateur', 'devices', 'probe', name)} finds channel_multiple")
    text = plain_yaml.dump(profile.model_dump(mode="json"))
    out.print("\n".join([*notes, text]))


# -------------------------------------------------------------------------------------------------- check, add, remove


@app.command()
def check(name: Name, json_: Json = False, trust: Trust = False) -> None:
    """Check that a device is ready to be measured on, and say how to put right what is not.

    Ends with 0 if all is well or there are only warnings, with 4 if something is missing.

    Example: secateur devices check kitchen
    """
    profile = _load(name)
    consent_to_profile(name, trust)
    checks = _check(profile)
    if json_:
        out.data([vars(c) for c in checks])
    else:
        _print_checks(name, checks)
    if any(c.status == "missing" for c in checks):
        raise typer.Exit(errors.EXIT_SURROUNDINGS)


class AddCommand(TyperCommand):
    """``devices add``, with the options of every kind of target behind ``--from``."""

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        after = next(i for i, parameter in enumerate(own) if "--from" in parameter.opts)
        taken = {parameter.name for parameter in own}
        options = [_parameter(own[after], option) for option in _add_options() if option.name not in taken]
        return [*own[: after + 1], *options, *own[after + 1 :]]


def _parameter(like: Any, option: AddOption) -> Any:
    """A target's option as one of the command line, which is kept in the context's ``meta``."""
    made = copy(like)
    made.name, made.opts, made.metavar, made.help = option.name, [f"--{option.name}"], option.metavar, option.help
    made.required, made.default, made.expose_value = False, None, False
    made.callback = _keep
    return made


def _keep(ctx: typer.Context, parameter: Any, value: str | None) -> None:
    if value:
        ctx.meta.setdefault(GIVEN, {})[parameter.name] = value


def _add_options() -> list[AddOption]:
    """The options of every kind of target, each name once; a kind that cannot be loaded is told where it is used."""
    from device_profiles.target import kinds

    found = {option.name: option for kind in kinds() for option in kind.add_options}
    return [found[name] for name in sorted(found)]


@app.command(cls=AddCommand)
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="How the device shall be called.")],
    base: Annotated[str, typer.Option("--from", metavar="BASE", help="The profile it is based on.")],
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of ONNX Runtime, instead of the base's.")
    ] = None,
    emulated: Annotated[bool, typer.Option("--emulated", help="An emulator: compare outputs, never times.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace your profile of that name, or hide a shipped one.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Only write the profile.")] = False,
    trust: Trust = False,
) -> None:
    """Add a device of your own, based on a template or on another device, and check it.

    Writes SECATEUR_HOME/devices/NAME.yaml, where every other setting can be changed.

    Example: secateur devices add kitchen --from raspberry-pi-5 --host pi@192.168.1.20

    Example: secateur devices add lab --from generic-arm64 --host lab.example:2222 --python /opt/ort/bin/python
    """
    _check_name(name, base, force)
    parent = _load(base)
    settings: dict[str, Any] = {"extends": base}
    connect = _connect(parent, context.meta.get(GIVEN, {}))
    settings |= {"connect": connect} if connect else {}
    settings |= {"threads": threads} if threads else {}
    settings |= {"timing": False} if emulated else {}
    path = _write(name, settings)
    out.print(f"Written: {one_line(path)}")
    if "python" in connect:  # said on the command line, by whoever is asked otherwise
        consent_to_profile(name, given=True)
    if no_check:
        out.print(f"Next: {command('secateur', 'devices', 'check', name)}")
        return
    consent_to_profile(name, trust)
    checks = _check(_load(name))
    _print_checks(name, checks)
    if any(c.status == "missing" for c in checks):
        out.print(f"Put that right, then: {command('secateur', 'devices', 'check', name)}")
        raise typer.Exit(errors.EXIT_SURROUNDINGS)
    following = ("benchmark", "MODEL.onnx", "--device", name, "--parity") if emulated else ("probe", name)
    out.print(f"Next: {command('secateur', 'devices', *following)}")


@app.command()
def remove(name: Annotated[str, typer.Argument(help="A device of your own.")]) -> None:
    """Remove a device of your own, and what a probe found out about it. Shipped profiles stay.

    Example: secateur devices remove kitchen
    """
    path = _folder() / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.is_file():
        own = ", ".join(sorted(p.stem for p in _folder().glob("*.yaml"))) or "none"
        shipped = f"{name} is shipped with Secateur and stays. " if name in _known() else ""
        raise errors.UserError(f"{shipped}no device {name!r} of your own; your own are: {own}")
    heirs = [p.stem for p in sorted(_folder().glob("*.yaml")) if p != path and _extends(p) == name]
    if heirs:
        raise errors.UserError(
            f"{', '.join(heirs)} extends {name}; remove that first, or let it extend another profile"
        )
    path.unlink()
    for kept in (_probe_file(name), _probe_file(name).with_suffix(".html")):
        kept.unlink(missing_ok=True)
    out.print(f"Removed: {one_line(path)}")


# -------------------------------------------------------------------------------------------------- benchmark and probe


@app.command()
def benchmark(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to time.")],
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="A device profile.")] = "local",
    against: Annotated[
        Path | None, typer.Option(metavar="BASELINE.onnx", help="Time this one in turn with it, and give the ratio.")
    ] = None,
    tier: Annotated[str, typer.Option(metavar="search|final", help="How long: briefly, or as a run's last timing.")] = (
        "final"
    ),
    within: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=10_000,
            metavar="PERCENT",
            help="With --against: go on until the ratio is known to +- PERCENT (95 %).",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=LONGEST_S, help="With --within: when to stop all the same.")
    ] = 120.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every single latency to this file.")
    ] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Compare the outputs with this machine's instead of timing.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Time an ONNX file on a device, or compare its outputs there with those of this machine.

    Example: secateur devices benchmark compact.onnx --against baseline.onnx --device kitchen

    Example: secateur benchmark compact.onnx --against baseline.onnx --within 0.5 --seconds 300

    Example: secateur devices benchmark compact.onnx --device emulated-a72 --parity
    """
    if within is not None and against is None:
        raise errors.UserError("--within is about a ratio: name the other model with --against")
    if tier not in ("search", "final"):
        raise errors.UserError(f"unknown tier {tier!r}; choose search (brief) or final (several processes)")
    for file in (model, against):
        if file is not None and not file.is_file():
            raise errors.UserError(
                f"no model file at {file}; give an ONNX file, such as compact.onnx of a run directory"
            )
    profile = _usable(device)
    consent_to_profile(device, trust)
    if parity:
        _parity(profile, model)
        return
    _require_timing(
        profile,
        "; compare its outputs instead: "
        + command("secateur", "devices", "benchmark", model, "--device", device, "--parity"),
    )
    models = {against.name: against} if against else {}
    models[model.name if model.name not in models else str(model)] = model
    result = _measure(profile, models, "search" if tier == "search" else "final", within, seconds)
    if json_file:
        json_file.write_text(result.to_json() + "\n", encoding="utf-8")
    _print_result(result, models)
    if json_file:
        out.print(f"Written: {one_line(json_file)}")


@app.command()
def probe(
    name: Name,
    seconds: Annotated[
        float, typer.Option(min=1, max=LONGEST_S, help="Seconds of timed calls, at most; loading comes on top.")
    ] = 90.0,
    trust: Trust = False,
) -> None:
    """Find the channel steps of a device: which widths cost no more than the next smaller ones.

    Times small networks of neighbouring widths. What it finds is kept beside your profiles and used by every run on
    this device until its runtime or clocks change.

    Example: secateur devices probe kitchen
    """
    from device_profiles import calibration, staircase
    from pipeline.progress import RichProgress

    profile = _usable(name)
    _require_timing(profile, "")
    consent_to_profile(name, trust)
    with _opened(profile) as target, RichProgress(err).stage(f"probe {name}") as report:
        found = staircase.probe(target, profile, seconds=seconds, progress=report)
    path = calibration.save(_folder(), profile, found)
    rows = table("", "", box=None, show_header=False)
    for kind, text in found.summary():
        rows.add_row(kind, text)
    out.print(rows)
    multiples = ", ".join(f"{kind}: {value}" for kind, value in found.multiples.model_dump().items())
    out.print(f"channel_multiple: {{{multiples}}}")
    out.print(f"Written: {one_line(path)}")
    out.print(f"Picture: {_draw(name, found, path.with_suffix('.html'))}")


def _draw(name: str, found: Staircase, path: Path) -> Path:
    """How latency steps with width, as a page that loads nothing."""
    from markupsafe import escape as safe

    from pipeline.report.charts import lines

    curves = {str(kind): curve for kind, curve in found.curves.items()}
    chart = lines(curves, "channels", "time, shortest = 1", 16)
    rows = "".join(f"<li><b>{safe(kind)}</b>: {safe(text)}</li>" for kind, text in found.summary())
    style = "body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto}svg{font-size:11px}"
    page = (
        f"<title>{safe(name)}</title><style>{style}</style><h1>Channel steps of {safe(name)}</h1>{chart}<ul>{rows}</ul>"
    )
    path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8">{page}</html>\n', encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- helpers


def descriptions() -> dict[str, str]:
    """Name -> description of every device profile; a broken file is listed with its fault."""
    return {name: _describe(_entry(name, path)) for name, path in sorted(_known().items())}


def _describe(entry: Mapping[str, Any]) -> str:
    from device_profiles.target import needs

    if entry["fault"]:
        return f"unusable: {entry['fault']}"
    lack = [f" (needs {needs(entry['profile'])})"] if entry["template"] else []
    remarks = lack + [" (emulated: no times, only parity)"] * (not entry["timing"])
    return str(entry["description"]) + "".join(remarks)


def _folder() -> Path:
    from pipeline.surroundings import home

    return home() / "devices"


def _known() -> dict[str, Path]:
    from device_profiles import known_profiles

    return known_profiles([_folder()])


def _load(name: str) -> DeviceProfile:
    """The profile, a template or not.

    Raises:
        UserError: there is none of that name, or it is not valid.
    """
    from device_profiles import DeviceError, load_profile

    try:
        return load_profile(name, [_folder()])
    except DeviceError as error:
        raise errors.UserError(str(error)) from error


def _usable(name: str) -> DeviceProfile:
    """The profile of a device that can be reached.

    Raises:
        UserError: as ``_load``, or it is a template.
    """
    from device_profiles import DeviceError
    from device_profiles.target import require_complete

    profile = _load(name)
    try:
        require_complete(profile)
    except DeviceError as error:
        raise errors.UserError(str(error)) from error
    return profile


def _require_timing(profile: DeviceProfile, instead: str) -> None:
    if not profile.timing:
        raise errors.UserError(
            f"{profile.name} is emulated (timing: false): times of an emulator mean nothing{instead}"
        )


@contextmanager
def _opened(profile: DeviceProfile) -> Iterator[Target]:
    from pipeline.config.trust import open_target

    target = open_target(profile)
    try:
        yield target
    finally:
        target.close()


def _entry(name: str, path: Path) -> dict[str, Any]:
    """What ``devices list`` tells of a profile, and the ``profile`` itself where it has no fault."""
    from device_profiles import DeviceError, load_profile
    from device_profiles.target import is_template, kind_of

    entry: dict[str, Any] = {"name": name, "fault": "", "template": False, "file": str(path)}
    try:
        profile = load_profile(path, [_folder()])
    except DeviceError as error:
        lines = str(error).splitlines()
        return entry | {"fault": lines[0] if len(lines) == 1 else f"{path.name}: {lines[1].strip()}"}
    return entry | {
        "target": profile.target,
        "host": kind_of(profile).address(profile.connect),
        "provider": profile.provider,
        "threads": profile.threads,
        "timing": profile.timing,
        "template": is_template(profile),
        "calibrated": _calibrated(name),
        "description": profile.description,
        "profile": profile,
    }


def _probe_file(name: str) -> Path:
    return _folder() / f"{name}.probe.json"


def _calibrated(name: str) -> bool:
    return _probe_file(name).is_file()


def _check(profile: DeviceProfile) -> tuple[Check, ...]:
    """Ask the device and judge its answer."""
    from importlib.metadata import PackageNotFoundError, version

    from device_profiles import DeviceError
    from device_profiles.check import judge
    from device_profiles.runtime import runtime_of
    from device_profiles.target import require_complete
    from pipeline.progress import RichProgress

    newest = {}
    for package in (runtime_of(profile).name, "numpy"):
        try:
            newest[package] = version(package)
        except PackageNotFoundError:
            continue
    answer: Mapping[str, Any] | DeviceError
    try:
        require_complete(profile)
        with _opened(profile) as target, RichProgress(err).stage(f"asking {profile.name}"):
            answer = target.prepare()
    except DeviceError as error:
        answer = error
    return judge(profile, answer, newest)


def _print_checks(name: str, checks: tuple[Check, ...]) -> None:
    rows = table("check", "", "found", box=None, header_style="bold")
    long = [entry for entry in checks if len(entry.found) > LONG]  # a command in it could not be copied from a table
    for entry in checks:
        found = "see below" if entry in long else entry.found
        rows.add_row(entry.name, Text(entry.status, style=MARKS[entry.status]), found)
    out.print(rows)
    for entry in long:
        out.print(f"\n{entry.name}: {entry.found}\n")
    for entry in checks:
        if entry.fix:
            out.labelled(f"{entry.name}, fix", "bold", entry.fix)
    missing, warnings = (sum(c.status == status for c in checks) for status in ("missing", "warning"))
    mind = f", {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
    out.print(f"{name} is not ready: {missing} missing{mind}" if missing else f"{name} is ready{mind}")


def _check_name(name: str, base: str, force: bool) -> None:
    """Refuse a name that is no file name, or one that is taken."""
    if not NAME.fullmatch(name) or name.endswith((".yaml", ".yml", ".probe")):
        raise errors.UserError(f"{name!r} cannot be a device's name: use letters, digits, '-', '_' and '.'")
    taken = _known().get(name)
    if taken is None or force:
        return
    if taken.parent == _folder():
        raise errors.UserError(f"you have a device {name} ({taken}); choose another name, or replace it with --force")
    if base != name:
        raise errors.UserError(f"{name} is a shipped profile; choose another name, or hide it with --force")


def _connect(base: DeviceProfile, given: Mapping[str, str]) -> dict[str, Any]:
    """The ``connect`` section of a new profile.

    Args:
        given: option of ``devices add`` -> text.

    Raises:
        UserError: the base's kind of target has no such option, a text cannot be read, or what is needed is not given.
    """
    from device_profiles.target import kind_of

    kind, connect = kind_of(base), dict[str, Any]()
    known = {option.name: option for option in kind.add_options}
    for name, text in given.items():
        if name not in known:
            raise errors.UserError(f"{base.name} is a target of kind {base.target}, which has no {name}{_other(name)}")
        try:
            connect |= known[name].read(text)
        except ValueError as error:
            raise errors.UserError(f"--{name} {text!r}: {error}") from error
    if missing := kind.missing({**base.connect, **connect}):
        words = " ".join(f"--{option.name} {option.example}" for option in kind.giving(missing))
        say = f"say where the device is with {words}" if words else f"give it a profile with connect.{missing[0]}"
        raise errors.UserError(f"{base.name} is a template: {say}")
    return connect


def _other(option: str) -> str:
    """Which base a device with this option needs."""
    from device_profiles.target import kinds

    owners = {kind.name for kind in kinds() if option in [known.name for known in kind.add_options]}
    bases = [entry for name, path in sorted(_known().items()) if (entry := _entry(name, path)).get("target") in owners]
    if not bases:
        return ""
    listed = command("secateur", "devices", "list")
    return f"; use --from {bases[0]['name']} or another one of kind {bases[0]['target']} ({listed})"


def _write(name: str, settings: Mapping[str, Any]) -> Path:
    """Write a profile of the user's own; one that turns out not to be valid is taken back.

    Raises:
        UserError: it is not valid.
        SurroundingsError: the file cannot be written.
    """
    from device_profiles import plain_yaml

    path = _folder() / f"{name}.yaml"
    comment = (
        "# Written by `secateur devices add`. `secateur devices show NAME` prints every setting that can stand here.\n"
    )
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(comment + plain_yaml.dump(dict(settings)), encoding="utf-8")
    except OSError as error:
        raise errors.SurroundingsError(f"cannot write {path}: {error.strerror}") from error
    try:
        _load(name)
    except errors.UserError:
        if before is None:
            path.unlink()
        else:
            path.write_text(before, encoding="utf-8")
        raise
    return path


def _extends(path: Path) -> str | None:
    """The profile that a file names as its base; None where it names none or cannot be read."""
    import yaml

    from device_profiles import plain_yaml

    try:
        content = plain_yaml.read(path.read_text(encoding="utf-8")).content
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    base = content.get("extends") if isinstance(content, dict) else None
    return base.written if isinstance(base, plain_yaml.Plain) else None if base is None else str(base)


def _measure(
    profile: DeviceProfile,
    models: Mapping[str, Path],
    tier: Literal["search", "final"],
    within: float | None,
    seconds: float,
) -> BenchmarkResult:
    from device_profiles import calibration, measure
    from pipeline.progress import RichProgress

    wanted = None if within is None else within / 100
    probed = calibration.load(_folder(), profile)
    floor = probed.noise_floor if probed else None
    with _opened(profile) as target, RichProgress(err).stage(f"timing on {profile.name}") as report:
        return measure(
            target,
            profile,
            models,
            tier,
            progress=report,
            noise_floor=floor,
            energy=True,
            half_width=wanted,
            seconds=seconds,
        )


def _print_result(result: BenchmarkResult, models: Mapping[str, Path]) -> None:
    """The table of a measurement, the ratio, and what speaks against the numbers."""
    from device_profiles.intervals import MIN_PROCESSES

    count = len(result.processes)
    title = f"{count} {'process' if count == 1 else 'processes'} on {result.profile}, tier {result.tier}"
    rows = table("one warm call", *models, title=title, right=tuple(models))
    for label, cells in _rows(result, models):
        rows.add_row(label, *cells)
    out.print(rows)
    if len(result.names) > 1:
        reference, name = result.names[0], result.names[1]
        kind = "CPU time" if result.statistic == "cpu" else "wall time"
        ratio, speedup = result.ratio(name, reference), result.speedup(name, reference)
        if ratio.known:
            out.print(f"Ratio: {ratio} of the baseline's {kind}, 95 % interval")
            out.print(f"Speed-up: {speedup.value:.2f}x, 95 % {speedup.low:.2f} to {speedup.high:.2f}")
        else:
            out.print(f"Ratio: {ratio.value:.3f} of the baseline's {kind}, a point estimate")
            out.print(f"Speed-up: {speedup.value:.2f}x; an interval needs {MIN_PROCESSES} processes (--tier final)")
    for flag in result.flags:
        out.labelled(flag, "yellow", FLAGS.get(flag, "see docs/devices.md"))


def _rows(result: BenchmarkResult, models: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    for q in (50, 90, 95, 99):
        yield f"p{q} latency", [_ms(result.percentile_ms(name, q)) for name in models]
    yield "undisturbed call", [_ms(result.calibrated_ms(name)) for name in models]
    yield "p50 CPU time", [_ms(result.cpu_p50_ms(name)) for name in models]
    yield "timed calls", [f"{len(result.wall_ms(name)):,}" for name in models]
    yield "first call", [_ms(result.first_ms(name)) for name in models]
    yield "loading", [_ms(result.load_ms(name)) for name in models]
    yield "peak memory", [_bytes(result.peak_rss_bytes(name)) for name in models]
    energies = [result.energy_mj(name) for name in models]
    if any(value is not None for value in energies):
        yield "energy of a call", ["not told" if value is None else f"{value:,.3f} mJ" for value in energies]
    yield "file size", [_bytes(path.stat().st_size) for path in models.values()]


def _ms(value: float) -> str:
    return f"{value:,.3f} ms"


def _bytes(value: int | None) -> str:
    if value is None:
        return "not told"
    return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.2f} kB"


def _parity(profile: DeviceProfile, model: Path) -> None:
    """Print how far the device's outputs are from this machine's; ends with 3 if that is more than rounding."""
    from device_profiles import DeviceError, LocalTarget
    from device_profiles.runtime import DEFAULT
    from pipeline.progress import RichProgress

    local = profile.model_copy(update={"runtime": DEFAULT, "provider": "CPUExecutionProvider", "threads": 1})
    try:
        with RichProgress(err).stage(f"outputs of {model.name} on {profile.name}"):
            with _opened(profile) as target:
                there = _outputs(target, profile, model)
            with closing(LocalTarget()) as this_machine:
                here = _outputs(this_machine, local, model)
    except DeviceError as error:
        if error.code != "bad-request":
            raise
        raise errors.SurroundingsError(f"the agent there cannot give outputs back: {error}") from error
    title = f"{model.name}: outputs on {profile.name} and here"
    rows = table("output", "shape", "largest difference", "same argmax", title=title)
    worst = 0.0
    for name, ours in here.items():
        difference, agreement = compare(there.get(name), ours)
        worst = max(worst, difference)
        rows.add_row(name, str(ours.shape), f"{difference:.1e} of the largest value", agreement)
    out.print(rows)
    if worst > PARITY_TOLERANCE:
        out.print(f"Not the same: {worst:.1e} is more than rounding ({PARITY_TOLERANCE:.0e}).")
        raise typer.Exit(errors.EXIT_GATE)
    out.print(f"The same, but for rounding (at most {PARITY_TOLERANCE:.0e}).")


def _outputs(target: Target, profile: DeviceProfile, model: Path) -> dict[str, Any]:
    """The outputs on the seeded input, name -> array."""
    import hashlib
    import tempfile

    import numpy as np

    from device_profiles.runtime import runtime_field
    from pipeline.archives import check_archive

    place = {"name": model.name, "path": target.put(model), "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    request = {"op": "infer", "models": [place], "provider": profile.provider, "threads": profile.threads, "seed": 0}
    request |= runtime_field(profile)
    answer = target.run(request, timeout_s=PARITY_TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="secateur-parity-") as folder:
        file = Path(folder) / "outputs.npz"
        target.fetch(answer["outputs"], file)
        check_archive(file, "the device sent no outputs of this model")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def compare(there: FloatArray | None, here: FloatArray) -> tuple[float, str]:
    """Largest difference as a fraction of the largest finite value here, and where the largest entries agree.

    Args:
        there: an output of any shape, as the device computed it; None = it has none of that name.
        here: the same output, as this machine computed it.

    Returns:
        The difference is infinite where one side is not a number or infinite and the other is something else.
    """
    import numpy as np

    if there is None or there.shape != here.shape:
        return float("inf"), "no such output there" if there is None else f"shape there: {there.shape}"
    a, b = there.astype(np.float64), here.astype(np.float64)
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0)) or 1.0
    distance = np.abs(a[differ] - b[differ])
    worst = float(np.where(np.isnan(distance), np.inf, distance).max(initial=0.0)) / scale
    if b.ndim < 2:
        return worst, "-"
    same = float(np.mean(a.reshape(len(a), -1).argmax(1) == b.reshape(len(b), -1).argmax(1)))
    return worst, f"{same:.0%}"
