"""``secateur devices benchmark``, also ``secateur benchmark``: how fast a model is on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.devices import profiles
from secateur.pipeline.cli.devices.parity import check_parity
from secateur.pipeline.cli.devices.profiles import LONGEST_S
from secateur.pipeline.cli.options import Trust
from secateur.pipeline.cli.trust import consent_to_profile
from secateur.pipeline.terminal import command, err, one_line, out, table

if TYPE_CHECKING:
    from secateur.device_profiles import BenchmarkResult, DeviceProfile

FLAGS = {
    "contended": "other programs used the processor: ratios hold, milliseconds are too long",
    "drift": "the device became slower or faster meanwhile: let it rest and measure again",
    "throttled": "the device slowed its clocks down or was too hot: cool it, or give it a better power supply",
    "clock-jump": "the device's clock was set meanwhile: latencies hold, dates do not",
    "unstable": "measured again as often as the tier allows, and still disturbed",
}


def benchmark(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to time.")],
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="A device profile.", autocompletion=completers.devices)
    ] = "local",
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
        if file is not None:
            _check(file)
    profile = profiles.usable(device)
    consent_to_profile(device, trust)
    if parity:
        check_parity(profile, model)
        return
    profiles.require_timing(
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


def _check(file: Path) -> None:
    """See that a file is an ONNX model that can be sent and opened.

    Raises:
        UserError: it is not.
    """
    from secateur.export.errors import ExportError
    from secateur.export.received import check_received

    if not file.is_file():
        raise errors.UserError(f"no model file at {file}; give an ONNX file, such as compact.onnx of a run directory")
    try:
        check_received(file)
    except ExportError as error:
        raise errors.UserError(str(error)) from error


def _measure(
    profile: DeviceProfile,
    models: Mapping[str, Path],
    tier: Literal["search", "final"],
    within: float | None,
    seconds: float,
) -> BenchmarkResult:
    from secateur.device_profiles import calibration, measure
    from secateur.pipeline.progress import RichProgress

    wanted = None if within is None else within / 100
    probed = calibration.load(profiles.folder(), profile)
    floor = probed.noise_floor if probed else None
    with profiles.opened(profile) as target, RichProgress(err).stage(f"timing on {profile.name}") as report:
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
    from secateur.device_profiles.intervals import MIN_PROCESSES

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
        out.labelled(flag, "yellow", FLAGS.get(flag, "see docs/explanation/intervals.md"))


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
