"""``secateur devices probe``: the channel steps of a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from secateur.pipeline.cli.devices import profiles
from secateur.pipeline.cli.devices.profiles import LONGEST_S, Name
from secateur.pipeline.cli.options import Trust
from secateur.pipeline.cli.trust import consent_to_profile
from secateur.pipeline.errors import UserError
from secateur.pipeline.terminal import err, one_line, out, table

if TYPE_CHECKING:
    from secateur.device_profiles import DeviceProfile
    from secateur.device_profiles.staircase import Staircase


def probe(
    name: Name,
    seconds: Annotated[
        float, typer.Option(min=1, max=LONGEST_S, help="Seconds of timed calls, at most; loading comes on top.")
    ] = 90.0,
    precision: Annotated[
        Literal["fp32", "int8"], typer.Option(help="Of the networks that are timed; each has steps of its own.")
    ] = "fp32",
    trust: Trust = False,
) -> None:
    """Find the channel steps of a device: which widths cost no more than the next smaller ones.

    Times small networks of neighbouring widths. What it finds is kept beside your profiles and used by every run on
    this device, in what it may ship, until its runtime or clocks change.

    Example: secateur devices probe kitchen
    """
    from secateur.device_profiles import calibration, staircase
    from secateur.pipeline.progress import RichProgress

    profile = profiles.usable(name)
    profiles.require_timing(profile, "")
    consent_to_profile(name, trust)
    scheme = "" if precision == staircase.FLOAT else _scheme(profile, precision)
    with profiles.opened(profile) as target, RichProgress(err).stage(f"probe {name}") as report:
        measured = staircase.probe(
            target, profile, seconds=seconds, progress=report, precision=precision, scheme=scheme
        )
    path = calibration.save(profiles.folder(), profile, measured)
    rows = table("", "", box=None, show_header=False)
    for kind, text in measured.summary():
        rows.add_row(kind, text)
    out.print(rows)
    multiples = ", ".join(f"{kind}: {value}" for kind, value in measured.multiples.model_dump().items())
    out.print(f"channel_multiple: {{{multiples}}}")
    out.print(f"Written: {one_line(path)}")
    out.print(f"Picture: {_draw(name, measured, path.with_suffix('.html'))}")


def _scheme(profile: DeviceProfile, precision: str) -> str:
    """The number types of a device's integers.

    Raises:
        UserError: its runtime loads no ONNX, which integers come in.
    """
    from secateur.device_profiles.runtime import runtime_of
    from secateur.pipeline.run.schemes import scheme_of

    runtime = runtime_of(profile)
    if runtime.format != "onnx":
        raise UserError(f"{profile.name} runs {runtime.name}, which loads no ONNX and so no {precision}; probe fp32")
    return scheme_of([profile])


def _draw(name: str, measured: Staircase, path: Path) -> Path:
    """How latency steps with width, as a page that loads nothing."""
    from markupsafe import escape as safe

    from secateur.pipeline.report.charts import lines, swatch

    curves = {str(kind): curve for kind, curve in measured.curves.items()}
    chart = lines(curves, "channels", "time, shortest = 1", 16)
    rows = "".join(
        f"<li>{swatch(str(kind))} <b>{safe(kind)}</b>: {safe(text)}</li>" for kind, text in measured.summary()
    )
    style = "body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto}svg{font-size:11px;max-width:100%}"
    style += ".swatch{width:1em} .grid{stroke:#ccc}"
    page = (
        f"<title>{safe(name)}</title><style>{style}</style><h1>Channel steps of {safe(name)}</h1>{chart}<ul>{rows}</ul>"
    )
    path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8">{page}</html>\n', encoding="utf-8")
    return path
